//! Everything a run found out.

use std::collections::{BTreeMap, btree_map::Entry};

use super::check::Verdict;
use super::contenders::{Contender, Moved};
use super::load::Figures;
use super::metrics::Metric;
use super::statistics::Summary;

/// By contender and figure, the rounds.
#[derive(Debug, Default)]
pub struct Results {
    samples: BTreeMap<(&'static str, String), Vec<f64>>,
    pub verdicts: BTreeMap<&'static str, Vec<Verdict>>,
    /// What could not be measured: of whom, what, why.
    pub failures: Vec<(String, String, String)>,
    pub moved: BTreeMap<&'static str, Vec<(String, Moved)>>,
    /// Rounds that a limited run left out.
    pub left_out: Vec<String>,
}

impl Results {
    /// Adds what one measurement gave.
    pub fn add(&mut self, contender: &Contender, figures: Figures) {
        for (name, value) in figures {
            self.samples.entry((contender.key, name)).or_default().push(value);
        }
    }

    /// Notes that something could not be measured, once.
    pub fn fail(&mut self, contender: &Contender, what: &str, error: &anyhow::Error) {
        let failure = (contender.label.to_owned(), what.to_owned(), format!("{error:#}"));
        if !self.failures.contains(&failure) {
            self.failures.push(failure);
        }
    }

    /// Whether it could not be measured.
    pub fn has_failed(&self, contender: &Contender, what: &str) -> bool {
        self.failures.iter().any(|(who, workload, _)| who == contender.label && workload == what)
    }

    /// Drops everything of these workloads.
    pub fn forget(&mut self, workloads: &[String]) {
        let of = |name: &str| super::workload_of(name).is_some_and(|workload| workloads.contains(&workload));
        let names_one = |words: &str| words.split(' ').any(of);
        self.samples.retain(|(_, figure), _| !of(figure));
        self.failures.retain(|(_, what, _)| !of(what));
        self.left_out.retain(|what| !names_one(what));
        for phases in self.moved.values_mut() {
            phases.retain(|(phase, _)| !names_one(phase));
        }
        if of(super::CHECK) {
            self.verdicts.clear();
        }
    }

    /// Adds what others have found out about other workloads.
    pub fn take_up(&mut self, others: Self) {
        self.samples.extend(others.samples);
        self.failures.extend(others.failures);
        self.left_out.extend(others.left_out);
        for (who, phases) in others.moved {
            self.moved.entry(who).or_default().splice(0..0, phases);
        }
        for (who, verdicts) in others.verdicts {
            if let Entry::Vacant(place) = self.verdicts.entry(who) {
                place.insert(verdicts);
            }
        }
    }

    /// A figure of a contender.
    pub fn get(&self, contender: &Contender, metric: &Metric) -> Option<Summary> {
        Summary::of(self.samples.get(&(contender.key, metric.key.to_owned()))?)
    }

    /// All there is.
    pub fn all(&self) -> impl Iterator<Item = (&'static str, &str, Summary)> {
        self.samples
            .iter()
            .filter_map(|((who, name), samples)| Some((*who, name.as_str(), Summary::of(samples)?)))
    }
}
