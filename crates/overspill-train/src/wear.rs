//! What a run costs the drive: bytes written, beside what the drive is rated for.
//!
//! Pure arithmetic. How much a step writes follows from the layout and the plan, so it is known before a run begins; how
//! fast it does so is known after a few steps. Both together, and the rating on the drive's data sheet, say how long a
//! drive would last that does nothing else.
//!
//! A rating is that of one drive. Of several volumes, the one that takes the largest share counts, because it is worn
//! out first; directories on one file system are one drive. Counted are the bytes of tensors: what manifests, the file
//! system's journal and the drive itself write besides is not seen from here, so a drive wears a little faster than it
//! says.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use overspill_swap::Durability;

use crate::layout::ModelLayout;
use crate::plan::MemoryPlan;

/// Bytes that a drive is rated to be written, as its data sheet says: `600TBW`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Endurance(u64);

/// A text is not a drive's rating.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a drive's rating; write a number and a unit, such as 600TBW, 1.2PBW or 500GB")]
pub struct NotAnEndurance {
    /// The text.
    pub text: String,
}

/// Units of ratings, the largest first, and how many decimal digits they move a number by.
const UNITS: [(&str, u32); 3] = [("PB", 15), ("TB", 12), ("GB", 9)];

impl Endurance {
    /// A rating of so many bytes; `None` for none.
    pub fn from_bytes(bytes: u64) -> Option<Self> {
        (bytes > 0).then_some(Self(bytes))
    }

    /// Bytes.
    pub fn bytes(self) -> u64 {
        self.0
    }
}

impl FromStr for Endurance {
    type Err = NotAnEndurance;

    /// Digits, maybe a point and more digits, and one of GB, TB and PB, with or without a W, in any case. What is no
    /// whole number of bytes is no rating, and neither is nothing.
    fn from_str(text: &str) -> Result<Self, NotAnEndurance> {
        let bytes = || {
            let upper = text.to_ascii_uppercase();
            let amount = upper.strip_suffix('W').unwrap_or(&upper);
            let (number, digits) =
                UNITS.iter().find_map(|&(unit, n)| Some((amount.strip_suffix(unit)?, n)))?;
            let (whole, fraction) = match number.split_once('.') {
                Some((_, "")) => return None,
                Some(parts) => parts,
                None => (number, ""),
            };
            let scaled = |part: &str, digits: u32| -> Option<u64> {
                let plain = !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
                part.parse::<u64>().ok().filter(|_| plain)?.checked_mul(10_u64.checked_pow(digits)?)
            };
            let beyond = match fraction {
                "" => 0,
                part => scaled(part, digits.checked_sub(u32::try_from(part.len()).ok()?)?)?,
            };
            scaled(whole, digits)?.checked_add(beyond).and_then(Self::from_bytes)
        };
        bytes().ok_or_else(|| NotAnEndurance { text: text.to_owned() })
    }
}

impl fmt::Display for Endurance {
    /// In full, so that it can be read again.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let &(unit, digits) =
            UNITS.iter().find(|(_, digits)| self.0 >= 10_u64.pow(*digits)).unwrap_or(&UNITS[2]);
        let (whole, fraction) = (self.0 / 10_u64.pow(digits), self.0 % 10_u64.pow(digits));
        let fraction = format!("{fraction:0width$}", width = digits as usize);
        let fraction = fraction.trim_end_matches('0');
        let point = if fraction.is_empty() { "" } else { "." };
        write!(f, "{whole}{point}{fraction}{unit}W")
    }
}

/// An amount as drives are sold: `12.3 GB`, in powers of ten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decimal(pub u64);

impl fmt::Display for Decimal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")];
        let bytes = self.0 as f64;
        match units.iter().find(|(size, _)| bytes >= 0.9995 * size) {
            Some((size, unit)) if bytes >= 99.95 * size => write!(f, "{:.0} {unit}", bytes / size),
            Some((size, unit)) => write!(f, "{:.1} {unit}", bytes / size),
            None => write!(f, "{bytes} B"),
        }
    }
}

/// What a run writes, as far as its plan says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forecast {
    /// Bytes of the first state: weights and moments.
    pub initial_bytes: u64,
    /// Bytes of each step: the new state, gradients, and layers' inputs.
    pub step_bytes: u64,
}

impl Forecast {
    /// What follows from the model and the plan.
    pub fn new(layout: &ModelLayout, plan: &MemoryPlan, durability: Durability) -> Self {
        Self {
            initial_bytes: plan.state_traffic(layout, durability).bytes_written,
            step_bytes: plan.traffic(layout, durability).bytes_written,
        }
    }

    /// Bytes of so many steps of a state that is there already.
    pub fn steps(self, steps: u64) -> u64 {
        self.step_bytes.saturating_mul(steps)
    }

    /// Bytes of a whole run.
    pub fn run(self, steps: u64) -> u64 {
        self.initial_bytes.saturating_add(self.steps(steps))
    }
}

/// A volume, as far as wear is concerned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its directory, as the user named it.
    pub directory: String,
    /// Its file system: two directories on one are one drive.
    pub device: u64,
    /// Its share of the state, in proportion to those of the others.
    pub weight: u32,
}

/// A drive, its rating, and how much of everything goes there.
#[derive(Clone, Debug, PartialEq)]
pub struct Rated {
    /// What it is rated for.
    pub endurance: Endurance,
    /// The first directory on it, if there are other drives to be told from.
    pub directory: Option<String>,
    /// Its share of all that is written, up to 1.
    pub share: f64,
}

/// What a drive has lost, and when it will have lost everything.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Wear {
    /// Share of the rated life that was used.
    pub life_used_fraction: f64,
    /// Days after which a new drive is worn out at this rate; `None` before anything was written.
    pub days_to_wear_out: Option<f64>,
}

/// A drive that would not last longer than this is worth a warning, in days.
pub const MONTH_DAYS: f64 = 30.0;

/// Steps after which the rate is taken for known.
pub(crate) const RATE_STEPS: usize = 3;

const DAY_SECONDS: f64 = 24.0 * 60.0 * 60.0;
const YEAR_DAYS: f64 = 365.25;

impl Rated {
    /// The drive that takes the largest share, if each of them is rated for `endurance`; `None` without places.
    pub fn busiest(endurance: Endurance, places: &[Place]) -> Option<Self> {
        let weight_of = |device: u64| -> u64 {
            places.iter().filter(|place| place.device == device).map(|place| u64::from(place.weight)).sum()
        };
        // The first of the largest.
        let busiest = places.iter().rev().max_by_key(|place| weight_of(place.device))?;
        let all: u64 = places.iter().map(|place| u64::from(place.weight)).sum();
        let is_alone = places.iter().all(|place| place.device == busiest.device);
        let share = if is_alone { 1.0 } else { weight_of(busiest.device) as f64 / all.max(1) as f64 };
        Some(Self { endurance, directory: (!is_alone).then(|| busiest.directory.clone()), share })
    }

    /// What writing `run_bytes` has cost the drive, and what `step_bytes` in `elapsed` mean in the long run.
    pub fn wear(&self, run_bytes: u64, step_bytes: u64, elapsed: Duration) -> Wear {
        let rated = self.endurance.bytes() as f64;
        let per_second = self.share * step_bytes as f64 / elapsed.as_secs_f64();
        let days = rated / per_second / DAY_SECONDS;
        Wear {
            life_used_fraction: self.share * run_bytes as f64 / rated,
            days_to_wear_out: days.is_finite().then_some(days),
        }
    }

    /// What to tell somebody whose drive does not last a month.
    pub fn warning(&self, wear: Wear) -> Option<String> {
        let days = wear.days_to_wear_out.filter(|&days| days < MONTH_DAYS)?;
        let per_day = Decimal((self.endurance.bytes() as f64 / days) as u64);
        let drive = match &self.directory {
            Some(directory) => format!("the drive of {directory}"),
            None => "the drive".to_owned(),
        };
        let rating = self.endurance;
        Some(match wear.life_used_fraction < 1.0 {
            true => {
                let lasts = lifetime(days);
                format!("at {per_day} a day, {drive}, rated for {rating}, is worn out in {lasts}")
            }
            false => format!("{drive}, rated for {rating}, is worn out already, at {per_day} a day"),
        })
    }
}

/// Days as people say them.
pub fn lifetime(days: f64) -> String {
    if days >= 100.0 * YEAR_DAYS {
        "more than 100 years".to_owned()
    } else if days >= 2.0 * YEAR_DAYS {
        format!("{:.1} years", days / YEAR_DAYS)
    } else if days >= 3.0 {
        format!("{days:.0} days")
    } else {
        match days * 24.0 {
            hours if hours < 1.0 => "less than an hour".to_owned(),
            hours if hours < 1.5 => "1 hour".to_owned(),
            hours => format!("{hours:.0} hours"),
        }
    }
}

#[cfg(test)]
mod tests;
