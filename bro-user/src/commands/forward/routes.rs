//! Which target the clients of each listener are connected to.

use bro_relay::listener::Listener;
use bro_relay::target::Target;

use crate::cli::Forward;
use crate::exit::Failure;

/// The listeners with their targets.
#[derive(Debug)]
pub(super) struct Routes {
    /// Each listener with the index of its target.
    pub(super) listeners: Vec<(Listener, usize)>,
    /// The targets.
    pub(super) targets: Vec<Target>,
}

impl Routes {
    /// Pairs each listener with its target: the one named for it, else the positional one.
    pub(super) fn of(options: &Forward, listeners: Vec<Listener>) -> Result<Self, Failure> {
        for (index, (name, _)) in options.targets.iter().enumerate() {
            if options.targets[..index].iter().any(|(before, _)| before == name) {
                return Err(Failure::Usage(format!("--target {name}=… is given more than once")));
            }
            if !listeners.iter().any(|listener| listener.name == *name) {
                let names: Vec<&str> = listeners.iter().map(|listener| listener.name.as_str()).collect();
                let sentence = format!(
                    "--target {name}=… matches no socket; the sockets passed are named {}",
                    names.join(", ")
                );
                if !options.allow_missing_sockets {
                    return Err(Failure::Usage(sentence));
                }
                tracing::warn!("{sentence}");
            }
        }
        let mut targets: Vec<Target> = Vec::new();
        let mut routes = Vec::with_capacity(listeners.len());
        for listener in listeners {
            let named =
                options.targets.iter().find(|(name, _)| *name == listener.name).map(|(_, target)| target);
            let Some(target) = named.or(options.target.as_ref()) else {
                return Err(Failure::Usage(format!(
                    "the socket “{}” ({}) has no target; give TARGET, or --target {}=ADDR",
                    listener.name, listener.address, listener.name
                )));
            };
            let index = targets.iter().position(|known| known == target).unwrap_or_else(|| {
                targets.push(target.clone());
                targets.len() - 1
            });
            routes.push((listener, index));
        }
        Ok(Self { listeners: routes, targets })
    }
}
