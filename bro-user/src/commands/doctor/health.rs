//! With `--ready=healthy`: is there a health check that could ever succeed?

use serde_json::Value;

use super::podman::{self, PodmanAnswer};
use super::{Check, listens};
use crate::installed::Installed;
use crate::podman::quadlet::{Quadlet, QuadletKind};
use crate::service::readiness::Ready;

const NAME: &str = "ready";

/// None where readiness does not depend on health checks, or is unknown.
pub(super) async fn check(installed: &Installed, quadlet: &Quadlet) -> Option<Check> {
    let forwarder = installed.forwarder()?;
    let follows = forwarder.options.ready() == Some(Ready::Healthy) && !forwarder.container_given;
    if !follows || quadlet.kind != QuadletKind::Container {
        return None;
    }
    let file = quadlet.file_name();
    if let Some(command) = quadlet.value("HealthCmd").filter(|command| !command.is_empty()) {
        return Some(match command {
            "none" => none(installed, &format!("HealthCmd=none in {file}")),
            _ => Check::ok(NAME, format!("HealthCmd= in {file} says when clients may come")),
        });
    }
    let Some(image) = quadlet.value("Image") else {
        return Some(none(installed, &format!("no HealthCmd= in {file}")));
    };
    let answer = podman::ask(installed.run_as.as_ref(), &["image", "inspect", image]).await;
    let PodmanAnswer::Yes(text) = answer else { return None };
    let described: Value = serde_json::from_str(&text).ok()?;
    Some(if has_health_check(&described) {
        Check::ok(NAME, format!("the health check of {image} says when clients may come"))
    } else {
        none(installed, &format!("no HealthCmd= in {file}, and no health check in {image}"))
    })
}

fn none(installed: &Installed, there_is: &str) -> Check {
    Check::bad(
        NAME,
        format!("--ready=healthy, and there is {there_is}: no client is ever connected"),
        format!(
            "HealthCmd= in the quadlet, or `{} {} --ready auto`",
            listens::activate(installed),
            installed.name
        ),
    )
}

/// `podman image inspect` prints a list; versions spell the key differently.
fn has_health_check(described: &Value) -> bool {
    let image = described.get(0).unwrap_or(described);
    let checks = ["Healthcheck", "HealthCheck"];
    let places = [Some(image), image.get("Config")];
    places.into_iter().flatten().any(|place| {
        checks.iter().filter_map(|key| place.get(key)?.get("Test")?.as_array()).any(|test| {
            test.first().and_then(Value::as_str).is_some_and(|kind| !kind.eq_ignore_ascii_case("none"))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_health_check_is_one_that_is_run() {
        let image = |text: &str| has_health_check(&serde_json::from_str(text).unwrap());
        assert!(image(r#"[{"Healthcheck":{"Test":["CMD-SHELL","true"]}}]"#));
        assert!(image(r#"[{"Config":{"Healthcheck":{"Test":["CMD","x"]}}}]"#));
        assert!(!image(r#"[{"Healthcheck":{"Test":["NONE"]}}]"#));
        assert!(!image(r#"[{"Healthcheck":null,"Config":{}}]"#) && !image("[]"));
    }
}
