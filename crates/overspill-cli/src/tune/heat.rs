//! A map of the grid: lengths of chunks down, depths across, the faster the brighter.

use std::fmt::{self, Display};

use overspill_train::ByteSize;

use super::grid::{self, Point, Speed};

/// How a rate is shown beside its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Paint {
    /// Not at all: the output is read by a program, or kept.
    Plain,
    /// By blocks of ink, for people who want no colors.
    Shades,
    /// By colors.
    Colors,
}

/// The map of one direction's rates; points that were not measured stay blank.
pub(crate) struct HeatMap<'a> {
    pub(crate) title: &'static str,
    pub(crate) points: &'a [(Point, Speed)],
    pub(crate) rate: fn(&Speed) -> f64,
    pub(crate) paint: Paint,
}

/// From slow to fast.
const SHADES: [&str; 5] = [" ", "░", "▒", "▓", "█"];
/// Background colors of the usual 256, from slow to fast: blue, over green, to yellow.
const COLORS: [u8; 7] = [17, 24, 30, 29, 34, 76, 220];
/// Columns are as wide as this.
const WIDTH: usize = 7;

impl Paint {
    /// What suits an output; `NO_COLOR` is the users' common wish for none.
    pub(crate) fn of_terminal(is_terminal: bool) -> Self {
        let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        match (is_terminal, no_color) {
            (false, _) => Self::Plain,
            (true, true) => Self::Shades,
            (true, false) => Self::Colors,
        }
    }

    /// A number as wide as a column; `share` tells slow (0) from fast (1).
    fn paint(self, number: &str, share: f64) -> String {
        let of = |steps: usize| ((share * steps as f64) as usize).min(steps - 1);
        match self {
            Self::Plain => format!("{number:>WIDTH$}"),
            Self::Shades => format!("{number:>width$} {}", SHADES[of(SHADES.len())], width = WIDTH - 2),
            Self::Colors => {
                let level = of(COLORS.len());
                let ink = if level + 2 < COLORS.len() { 255 } else { 16 };
                format!("\x1b[48;5;{};38;5;{ink}m{number:>WIDTH$}\x1b[0m", COLORS[level])
            }
        }
    }
}

impl Display for HeatMap<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rates = || self.points.iter().map(|(_, speed)| (self.rate)(speed));
        let (slow, fast) = (rates().fold(f64::INFINITY, f64::min), rates().fold(0.0, f64::max));
        write!(f, "{:12}", format!("{}, GB/s", self.title))?;
        for depth in grid::depths() {
            write!(f, "{:>WIDTH$}", format!("× {depth}"))?;
        }
        writeln!(f)?;
        for (chunk_bytes, row) in grid::rows() {
            let mut line = format!("{:12}", ByteSize(chunk_bytes as u64).to_string());
            for point in row {
                let found = self.points.iter().find(|(other, _)| *other == point);
                line += &match found.map(|(_, speed)| (self.rate)(speed)) {
                    Some(rate) if fast > slow => {
                        self.paint.paint(&format!("{rate:.2}"), (rate - slow) / (fast - slow))
                    }
                    Some(rate) => self.paint.paint(&format!("{rate:.2}"), 1.0),
                    None => format!("{:>WIDTH$}", "–"),
                };
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        writeln!(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(paint: Paint) -> String {
        let speed = |read_gbps| Speed { read_gbps, write_gbps: 1.0 };
        let points: Vec<_> =
            Point::DEFAULT.neighbors().zip(1..).map(|(point, i)| (point, speed(f64::from(i)))).collect();
        HeatMap { title: "read", points: &points, rate: |speed| speed.read_gbps, paint }.to_string()
    }

    #[test]
    fn a_plain_map_is_numbers_and_a_painted_one_has_the_same() {
        let plain = map(Paint::Plain);
        assert!(plain.starts_with("read, GB/s      × 4    × 8   × 16   × 32   × 64\n"), "{plain}");
        assert!(!plain.contains('\x1b') && !plain.contains('█'));
        assert!(map(Paint::Shades).contains('█') && !map(Paint::Shades).contains('\x1b'));
        assert!(map(Paint::Colors).contains("\x1b[48;5;220"));
        for number in ["1.00", "8.00"] {
            for paint in [Paint::Plain, Paint::Shades, Paint::Colors] {
                assert!(map(paint).contains(number));
            }
        }
        assert_eq!(plain.lines().count(), 8);
    }

    #[test]
    fn no_colors_where_nobody_sees_them() {
        assert_eq!(Paint::of_terminal(false), Paint::Plain);
    }
}
