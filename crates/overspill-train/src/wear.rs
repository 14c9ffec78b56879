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
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes(text: &str) -> Option<u64> {
        text.parse::<Endurance>().ok().map(Endurance::bytes)
    }

    fn place(directory: &str, device: u64, weight: u32) -> Place {
        Place { directory: directory.to_owned(), device, weight }
    }

    const RATED: Endurance = Endurance(600_000_000_000_000);

    #[test]
    fn ratings_are_read_as_data_sheets_write_them() {
        assert_eq!(bytes("600TBW"), Some(600_000_000_000_000));
        assert_eq!(bytes("600TB"), Some(600_000_000_000_000));
        assert_eq!(bytes("1.2PBW"), Some(1_200_000_000_000_000));
        assert_eq!(bytes("0.5gb"), Some(500_000_000));
        assert_eq!(bytes("18446.744073709551615PB"), Some(u64::MAX));
    }

    #[test]
    fn what_is_not_a_rating_is_refused() {
        for text in [
            "",
            "TBW",
            "600",
            "600W",
            "600TiB",
            "600MB",
            "-1TB",
            "+1TB",
            "1e3TB",
            "1,5TB",
            ".5TB",
            "5.TB",
            " 5TB",
            "5 TB",
            "0TB",
            "0.0PB",
            "5TBWW",
            "5TB ",
            "1.2.3TB",
            "0.0000000001GB",
            "18446.744073709551616PB",
            "99999999999999999999GB",
            "٣TB",
        ] {
            assert_eq!(bytes(text), None, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn a_rating_that_is_shown_is_read_again(bytes in 1..=u64::MAX) {
            prop_assert_eq!(Endurance(bytes).to_string().parse(), Ok(Endurance(bytes)));
        }

        #[test]
        fn no_text_is_read_as_anything_but_what_it_says(
            whole in "[0-9]{0,6}", fraction in "(\\.[0-9]{0,10})?", unit in "[ kMGTPgtp]?[iI]?[bB]?[wW]?"
        ) {
            let text = format!("{whole}{fraction}{unit}");
            let said = format!("{whole}{fraction}").parse::<f64>().ok();
            let size = |unit: &str| UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit));
            let unit = unit.strip_suffix(['w', 'W']).unwrap_or(&unit);
            match (bytes(&text), said, size(unit)) {
                (Some(read), Some(said), Some(&(_, digits))) => {
                    let meant = said * 10_f64.powi(digits.cast_signed());
                    prop_assert!((read as f64 - meant).abs() <= 1e-9 * meant, "{} is not {}", read, text);
                }
                (Some(_), ..) => prop_assert!(false, "{} was read", text),
                (None, Some(said), Some(&(_, digits))) => {
                    let lacks_digits = whole.is_empty() || fraction == ".";
                    let too_fine = fraction.len() > digits as usize + 1;
                    let too_large = said * 10_f64.powi(digits.cast_signed()) >= u64::MAX as f64;
                    prop_assert!(said == 0.0 || lacks_digits || too_fine || too_large, "{} was refused", text);
                }
                (None, ..) => {}
            }
        }

        #[test]
        fn the_busiest_drive_takes_no_less_than_its_part_and_no_more_than_everything(
            volumes in prop::collection::vec((0u64..4, 1u32..100), 1..8)
        ) {
            let places: Vec<_> = volumes.iter().map(|&(device, weight)| place("d", device, weight)).collect();
            let rated = Rated::busiest(RATED, &places).unwrap();
            let devices = volumes.iter().map(|&(device, _)| device).collect::<std::collections::BTreeSet<_>>();
            prop_assert!(rated.share <= 1.0 && rated.share * devices.len() as f64 > 1.0 - 1e-9);
            prop_assert_eq!(rated.directory.is_some(), devices.len() > 1);
        }

        #[test]
        fn what_is_used_by_the_day_it_is_worn_out_is_everything(
            rated in 1_000_000_000u64..1 << 60, step in 1u64..1 << 50, seconds in 0.01f64..1e5, share in 0.01f64..=1.0
        ) {
            let drive = Rated { endurance: Endurance(rated), directory: None, share };
            let wear = drive.wear(step, step, Duration::from_secs_f64(seconds));
            let days = wear.days_to_wear_out.unwrap();
            let used = wear.life_used_fraction * days * DAY_SECONDS / seconds;
            prop_assert!((used - 1.0).abs() < 1e-6, "{}", used);
            prop_assert_eq!(drive.warning(wear).is_some(), days < MONTH_DAYS);
        }
    }

    #[test]
    fn directories_on_one_file_system_wear_one_drive() {
        let places = [place("a", 1, 2), place("b", 2, 3), place("c", 1, 3)];
        let rated = Rated::busiest(RATED, &places).unwrap();
        assert_eq!((rated.directory.as_deref(), rated.share), (Some("a"), 5.0 / 8.0));
        let rated = Rated::busiest(RATED, &places[1..2]).unwrap();
        assert_eq!((rated.directory, rated.share), (None, 1.0), "there is nothing to tell it from");
        assert_eq!(Rated::busiest(RATED, &[]), None);
    }

    #[test]
    fn a_run_that_wrote_nothing_wears_nothing_out() {
        let rated = Rated::busiest(RATED, &[place("a", 1, 1)]).unwrap();
        for elapsed in [Duration::ZERO, Duration::from_secs(1)] {
            let wear = rated.wear(0, 0, elapsed);
            assert_eq!(wear, Wear { life_used_fraction: 0.0, days_to_wear_out: None });
            assert_eq!(rated.warning(wear), None);
        }
    }

    #[test]
    fn a_drive_that_does_not_last_a_month_is_warned_of_by_its_directory() {
        let rated = Rated::busiest(RATED, &[place("/a", 1, 1), place("/b", 2, 3)]).unwrap();
        // 75 % of 80 TB a day is a tenth of the rating.
        let wear = rated.wear(1, 80_000_000_000_000, Duration::from_secs(86_400));
        let expected = "at 60.0 TB a day, the drive of /b, rated for 600TBW, is worn out in 10 days";
        assert_eq!(rated.warning(wear).as_deref(), Some(expected));
    }

    #[test]
    fn a_drive_whose_rating_is_written_already_is_not_said_to_last() {
        let rated = Rated::busiest(RATED, &[place("/a", 1, 1)]).unwrap();
        let warning = |run_bytes| {
            let step_bytes = 600_000_000_000_000;
            rated.warning(rated.wear(run_bytes, step_bytes, Duration::from_secs(86_400)))
        };
        let less = warning(599_999_999_999_999).unwrap();
        assert!(less.ends_with("is worn out in 24 hours"), "{less}");
        let expected = "the drive, rated for 600TBW, is worn out already, at 600 TB a day";
        assert_eq!(warning(600_000_000_000_000).as_deref(), Some(expected));
    }

    #[test]
    fn amounts_and_times_are_shown_as_people_say_them() {
        let shown = |bytes| Decimal(bytes).to_string();
        assert_eq!(
            [shown(0), shown(999), shown(1000), shown(12_345_678_901)],
            ["0 B", "999 B", "1.0 kB", "12.3 GB"]
        );
        assert_eq!(
            [shown(999_960), shown(123_456_000_000_000), shown(u64::MAX)],
            ["1.0 MB", "123 TB", "18447 PB"]
        );
        let hours = |hours| lifetime(hours / 24.0);
        assert_eq!(
            [hours(0.0), hours(0.99), hours(1.01)],
            ["less than an hour", "less than an hour", "1 hour"]
        );
        assert_eq!([hours(1.51), lifetime(2.5), lifetime(29.6)], ["2 hours", "60 hours", "30 days"]);
        assert_eq!([lifetime(1000.0), lifetime(1e9)], ["2.7 years", "more than 100 years"]);
    }
}
