//! How much of everything, and what a short run leaves out when the time does not suffice.

use std::time::{Duration, Instant};

/// The amounts.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct Plan {
    pub name: String,
    /// Rounds of what is measured in rounds.
    pub rounds: usize,
    pub program_rounds: usize,
    pub cold_rounds: usize,
    pub idle_rounds: usize,
    /// How long one measurement lasts.
    pub seconds: f64,
    pub idle: Vec<usize>,
    pub transactions: u32,
    pub redis_requests: u32,
    pub wrk_seconds: u32,
    /// Clients are on another host, at the far end of a pair of interfaces.
    #[serde(default)]
    pub from_another_host: bool,
    /// The whole run, if it is limited: rounds beyond the first are left out when they would not fit.
    #[serde(skip)]
    pub limit: Option<Duration>,
}

impl Plan {
    /// With so many rounds of whatever is measured in rounds.
    pub fn with_rounds(mut self, rounds: usize) -> Self {
        (self.rounds, self.program_rounds) = (rounds, rounds);
        self
    }

    /// How long one measurement may take until it is given up.
    pub fn load_limit(&self) -> Duration {
        Duration::from_secs_f64(4.0 + 16.0 * self.seconds)
    }

    /// The same for so many idle connections.
    pub fn idle_limit(&self, count: usize) -> Duration {
        Duration::from_secs_f64(8.0 + count as f64 / 100.0)
    }

    /// The same for a real program.
    pub fn program_limit(&self) -> Duration {
        Duration::from_secs(10 * u64::from(self.wrk_seconds))
    }

    /// Under three minutes on two cores.
    pub fn quick() -> Self {
        Self {
            name: "quick".into(),
            rounds: 3,
            program_rounds: 2,
            cold_rounds: 5,
            idle_rounds: 1,
            seconds: 0.2,
            idle: vec![1000],
            transactions: 300,
            redis_requests: 5000,
            wrk_seconds: 1,
            from_another_host: false,
            limit: Some(Duration::from_secs(160)),
        }
    }

    /// The usual one.
    pub fn usual() -> Self {
        Self {
            name: "default".into(),
            rounds: 5,
            program_rounds: 5,
            cold_rounds: 9,
            idle_rounds: 1,
            seconds: 0.5,
            idle: vec![1000, 9000],
            transactions: 1000,
            redis_requests: 20_000,
            wrk_seconds: 1,
            from_another_host: false,
            limit: None,
        }
    }

    /// For figures that are published.
    pub fn full() -> Self {
        Self {
            name: "full".into(),
            rounds: 9,
            program_rounds: 5,
            cold_rounds: 21,
            idle_rounds: 3,
            seconds: 1.0,
            idle: vec![1000, 9000],
            transactions: 3000,
            redis_requests: 60_000,
            wrk_seconds: 3,
            from_another_host: false,
            limit: None,
        }
    }
}

/// The time that a limited run has, phase by phase.
#[derive(Debug)]
pub struct Clock {
    begin: Instant,
    limit: Option<Duration>,
}

impl Clock {
    pub fn start(plan: &Plan) -> Self {
        Self { begin: Instant::now(), limit: plan.limit }
    }

    /// Since the start.
    pub fn elapsed(&self) -> Duration {
        self.begin.elapsed()
    }

    /// Whether something that takes so long still fits into the part of the run up to here.
    pub fn fits(&self, what: Duration, up_to: f64) -> bool {
        self.limit.is_none_or(|limit| self.elapsed() + what <= limit.mul_f64(up_to))
    }
}
