//! Amounts of memory and storage as people write them: `64MiB`, `1.5GiB`, `500MB`.

use std::fmt;
use std::str::FromStr;

/// A number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

/// A text is not an amount of bytes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a size; write a number and a unit, such as 512MiB, 8GiB or 600GB")]
pub struct NotASize {
    /// The text.
    pub text: String,
}

const BINARY: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];

/// Unit names in lower case, and what they multiply with. Single letters are binary, as in most tools.
const UNITS: [(&str, u64); 15] = [
    ("", 1),
    ("b", 1),
    ("k", 1 << 10),
    ("kib", 1 << 10),
    ("kb", 1_000),
    ("m", 1 << 20),
    ("mib", 1 << 20),
    ("mb", 1_000_000),
    ("g", 1 << 30),
    ("gib", 1 << 30),
    ("gb", 1_000_000_000),
    ("t", 1 << 40),
    ("tib", 1 << 40),
    ("tb", 1_000_000_000_000),
    ("bytes", 1),
];

impl FromStr for ByteSize {
    type Err = NotASize;

    fn from_str(text: &str) -> Result<Self, NotASize> {
        let refused = || NotASize { text: text.to_owned() };
        let trimmed = text.trim();
        let split = trimmed.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(trimmed.len());
        let (number, unit) = trimmed.split_at(split);
        let unit = unit.trim().to_ascii_lowercase();
        let factor = UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(refused)?.1;
        if let Ok(whole) = number.parse::<u64>() {
            return whole.checked_mul(factor).map(ByteSize).ok_or_else(refused);
        }
        let fraction: f64 = number.parse().map_err(|_| refused())?;
        let bytes = fraction * factor as f64;
        // Above 2^53 a fraction of a byte can't be told any more; such sizes are given as whole numbers.
        if bytes < (1u64 << 53) as f64 { Ok(ByteSize(bytes as u64)) } else { Err(refused()) }
    }
}

impl fmt::Display for ByteSize {
    /// Writes at most one decimal, in the largest binary unit that gives at least 1.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut value = self.0 as f64;
        let mut unit = 0;
        while value >= 1024.0 && unit + 1 < BINARY.len() {
            value /= 1024.0;
            unit += 1;
        }
        let whole = value.fract() < 0.05 || unit == 0;
        if whole {
            write!(f, "{value:.0} {}", BINARY[unit])
        } else {
            write!(f, "{value:.1} {}", BINARY[unit])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(text: &str) -> Option<u64> {
        text.parse::<ByteSize>().ok().map(|size| size.0)
    }

    #[test]
    fn people_write_sizes_in_many_ways() {
        assert_eq!(size("4096"), Some(4096));
        assert_eq!(size("64MiB"), Some(64 << 20));
        assert_eq!(size("64 mib"), Some(64 << 20));
        assert_eq!(size("8G"), Some(8 << 30));
        assert_eq!(size("1.5GiB"), Some(3 << 29));
        assert_eq!(size("600GB"), Some(600_000_000_000));
    }

    #[test]
    fn what_is_not_a_size_is_refused() {
        for text in
            ["", "MiB", "-1", "1e3", "12 parsecs", "99999999999999999999", "20000000TiB", "1.2.3G", "nan"]
        {
            assert_eq!(size(text), None, "{text}");
        }
    }

    #[test]
    fn sizes_are_shown_in_the_largest_unit_that_fits() {
        assert_eq!(ByteSize(1).to_string(), "1 B");
        assert_eq!(ByteSize(64 << 20).to_string(), "64 MiB");
        assert_eq!(ByteSize(3 << 29).to_string(), "1.5 GiB");
    }
}
