//! Medians, spreads and percentiles, and when two figures can be told apart.

use serde::Serialize;

use super::load::Figures;

/// What rounds gave for one figure.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    pub median: f64,
    pub min: f64,
    pub max: f64,
    pub samples: Vec<f64>,
}

impl Summary {
    /// Of at least one round.
    pub fn of(samples: &[f64]) -> Option<Self> {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median = if sorted.len() % 2 == 1 {
            sorted[middle]
        } else {
            f64::midpoint(sorted[middle - 1], sorted[middle])
        };
        Some(Self { median, min, max, samples: samples.to_vec() })
    }

    /// Whether every round of one was better than every round of the other. With three rounds each, chance alone
    /// does that once in ten times; with five, once in 126.
    pub fn differs_from(&self, other: &Self) -> bool {
        self.samples.len() > 1 && other.samples.len() > 1 && (self.max < other.min || other.max < self.min)
    }
}

/// The durations of many answers, in seconds, in order.
#[derive(Debug)]
pub struct Percentiles(Vec<f64>);

impl Percentiles {
    pub fn of(mut durations: Vec<f64>) -> Self {
        durations.sort_by(f64::total_cmp);
        Self(durations)
    }

    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// The duration that so large a part of the answers did not exceed.
    pub fn at(&self, part: f64) -> f64 {
        let place = (part * self.0.len() as f64).ceil() as usize;
        self.0.get(place.clamp(1, self.0.len().max(1)) - 1).copied().unwrap_or(0.0)
    }

    /// As figures whose names begin so.
    pub fn figures(&self, name: &str) -> Figures {
        [
            ("p50", self.at(0.5)),
            ("p99", self.at(0.99)),
            ("p999", self.at(0.999)),
            ("answers", self.count() as f64),
        ]
        .map(|(what, value)| (format!("{name}.{what}"), value))
        .into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_answers_that_came() {
        let hundred = Percentiles::of((1..=100).rev().map(f64::from).collect());
        assert_eq!((hundred.at(0.5), hundred.at(0.99), hundred.at(0.999)), (50.0, 99.0, 100.0));
        assert_eq!(Percentiles::of(vec![7.0]).at(0.5), 7.0);
    }

    #[test]
    fn overlapping_rounds_cannot_be_told_apart() {
        let of = |samples: &[f64]| Summary::of(samples).expect("samples");
        assert!(of(&[1.0, 2.0, 3.0]).differs_from(&of(&[3.5, 4.0, 9.0])));
        assert!(!of(&[1.0, 2.0, 3.6]).differs_from(&of(&[3.5, 4.0, 9.0])));
        assert!(!of(&[1.0]).differs_from(&of(&[9.0])));
        assert_eq!(of(&[4.0, 1.0]).median, 2.5);
        assert!(Summary::of(&[]).is_none());
    }
}
