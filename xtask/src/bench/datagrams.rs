//! The phase that measures datagrams: a service and a start of each contender of its own, then rounds that take turns.

use std::time::Duration;

use anyhow::Result;

use super::contenders::{Contender, Running};
use super::datagram_service;
use super::launch::Launch;
use super::load::Figures;
use super::load::datagrams::name_of;
use super::{Bench, say};

/// The workload's name.
pub const DATAGRAMS: &str = "datagrams";

/// Bytes of a datagram: a question to a name server, a packet of QUIC or a tunnel, one that is longer than an Ethernet frame.
const SIZES: [usize; 3] = [64, 1200, 8192];

/// The first of the service's ports.
const FIRST_PORT: u16 = 9500;

impl Bench {
    pub fn datagrams(&mut self) {
        if !self.choice.has(DATAGRAMS) {
            return;
        }
        say(&self.clock, "datagrams: starting the service");
        if let Err(error) = self.datagram_rounds()
            && let Some(one) = self.present.first().cloned()
        {
            self.results.fail(&Contender { label: "everyone", ..one }, DATAGRAMS, &error);
        }
    }

    fn datagram_rounds(&mut self) -> Result<()> {
        let those: Vec<Contender> =
            self.present.iter().filter(|contender| contender.relays_datagrams()).cloned().collect();
        let ports: Vec<u16> = (FIRST_PORT..).take(those.len()).collect();
        let shared: Vec<u16> = ports
            .iter()
            .zip(&those)
            .filter(|(_, contender)| !contender.has_its_own_datagram_service())
            .map(|(port, _)| *port)
            .collect();
        let launch = Launch { inside: self.scene.inside(true), ..Launch::default() };
        let _service = datagram_service::start(launch, &shared)?;
        let mut up = Vec::new();
        for (contender, port) in those.into_iter().zip(ports) {
            match contender.start_for_datagrams(&self.scene, port) {
                Ok(running) => up.push((contender, running)),
                Err(error) => self.results.fail(&contender, DATAGRAMS, &error),
            }
        }
        for round in 0..self.plan.rounds {
            if round > 0 && !self.clock.fits(Duration::ZERO, 0.9) {
                let (left, all) = (self.plan.rounds - round, self.plan.rounds);
                self.results.left_out.push(format!("{left} of {all} rounds of {DATAGRAMS}"));
                break;
            }
            for size in SIZES {
                say(
                    &self.clock,
                    &format!("round {} of {}: datagrams of {size} bytes", round + 1, self.plan.rounds),
                );
                for place in 0..up.len() {
                    // Each round begins with another one.
                    let (contender, running) = &up[(place + round) % up.len()];
                    let workload = name_of(size);
                    if self.results.has_failed(contender, &workload) {
                        continue;
                    }
                    match self.datagram_load(running, size) {
                        Ok(figures) => self.results.add(contender, figures),
                        Err(error) => self.results.fail(contender, &workload, &error),
                    }
                }
            }
        }
        Ok(())
    }

    fn datagram_load(&self, running: &Running, size: usize) -> Result<Figures> {
        let mut args =
            vec!["datagram-load".to_owned(), running.address.to_string(), format!("--size={size}")];
        args.push(format!("--seconds={}", self.plan.seconds));
        args.extend(running.group().map(|group| format!("--group={group}")));
        Ok(serde_json::from_str(&running.client(&self.scene, &args, self.plan.load_limit())?)?)
    }
}
