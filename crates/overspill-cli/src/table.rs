//! Tables for people.

use std::fmt::{self, Display};

/// Rows of cells, the first of which is a name; columns are as wide as their widest cell.
#[derive(Debug, Default)]
pub(crate) struct Table(Vec<Vec<String>>);

impl Table {
    /// Adds a row of a name and one value.
    pub(crate) fn line(&mut self, name: &str, value: impl Display) {
        self.0.push(vec![name.to_owned(), value.to_string()]);
    }

    /// Adds a row of any number of cells.
    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.0.push(cells.into_iter().collect());
    }
}

impl Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = self.0.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            self.0.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max()
        };
        let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
        for row in &self.0 {
            let mut line = String::new();
            for (column, (cell, &width)) in row.iter().zip(&widths).enumerate() {
                let padding = " ".repeat(width - cell.chars().count());
                match column {
                    0 => line += &format!("{cell}{padding}"),
                    _ => line += &format!("  {padding}{cell}"),
                }
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// A whole number with its thousands apart: `46 145 024`.
pub(crate) fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut apart = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            apart.push(' ');
        }
        apart.push(digit);
    }
    apart
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_left_and_values_right() {
        let mut table = Table::default();
        table.line("steps", 80);
        table.line("parameters", thousands(46_145_024));
        assert_eq!(table.to_string(), "steps               80\nparameters  46 145 024\n");
        assert_eq!(thousands(999), "999");
        assert_eq!(thousands(1000), "1 000");
    }
}
