//! Two sides measured in turns.

/// Rates of both sides, in 10⁹ bytes per second; neighbors belong together.
#[derive(Debug, Default)]
pub(crate) struct Pairs {
    ours: Vec<f64>,
    theirs: Vec<f64>,
}

impl Pairs {
    /// Measures both sides `count` times, changing who goes first; ours comes last, so that what it leaves behind can
    /// be looked at.
    pub(crate) fn measure<S, E>(
        count: usize,
        state: &mut S,
        ours: impl Fn(&mut S) -> Result<f64, E>,
        theirs: impl Fn(&mut S) -> Result<f64, E>,
    ) -> Result<Self, E> {
        let mut pairs = Self::default();
        for round in 0..count {
            if (count - round).is_multiple_of(2) {
                pairs.ours.push(ours(state)?);
                pairs.theirs.push(theirs(state)?);
            } else {
                pairs.theirs.push(theirs(state)?);
                pairs.ours.push(ours(state)?);
            }
        }
        Ok(pairs)
    }

    /// Median rate of our side.
    pub(crate) fn ours(&self) -> f64 {
        median(self.ours.clone())
    }

    /// Median rate of the other side.
    pub(crate) fn theirs(&self) -> f64 {
        median(self.theirs.clone())
    }

    /// Median of the ratios of neighbors.
    pub(crate) fn ratio(&self) -> f64 {
        median(self.ours.iter().zip(&self.theirs).map(|(ours, theirs)| ours / theirs).collect())
    }

    /// Number of pairs.
    pub(crate) fn count(&self) -> usize {
        self.ours.len()
    }
}

/// The middle value, or the mean of the two in the middle; NaN of nothing.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n if n.is_multiple_of(2) => (values[n / 2 - 1] + values[n / 2]) / 2.0,
        n => values[n / 2],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sides_take_turns_and_the_ratio_is_that_of_neighbors() {
        let mut order = String::new();
        let mut speed = [10.0, 2.0, 4.0].into_iter();
        let mut state = (&mut order, &mut speed, 0.0);
        let pairs = Pairs::measure::<_, ()>(
            3,
            &mut state,
            |(order, _, last)| {
                order.push('o');
                Ok(*last + 1.0)
            },
            |(order, speed, last)| {
                order.push('t');
                *last = speed.next().unwrap();
                Ok(*last)
            },
        )
        .unwrap();
        assert_eq!(order, "tootto");
        assert_eq!(pairs.theirs(), 4.0);
        assert_eq!(pairs.count(), 3);
        assert_eq!(median(vec![1.0, 4.0]), 2.5);
        assert!((pairs.ratio() - 1.25).abs() < 1e-12, "{pairs:?}");
    }
}
