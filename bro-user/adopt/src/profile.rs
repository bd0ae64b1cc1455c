//! The seccomp profile of a container whose sockets are adopted: another profile, which besides tells the agent at `listenerPath` of bind(2),
//! listen(2) and shutdown(2) (containers-common's seccomp.json, which Podman makes the OCI runtime's `linux.seccomp` of).
//!
//! What leads past a filter goes: 32-bit calls on a 64-bit host (`subArchitectures`), socketcall(2), which holds its arguments in memory, and
//! io_uring, whose operations no filter sees. MSG_FASTOPEN connects without connect(2), so it is refused.
//!
//! A call that gets a rule here has no other one: runtimes hand rules to libseccomp, which has no order among them. So a container never may
//! do what it could not under the source, but for what the agent allows. A profile of this module's is no source: it listens already,
//! and no longer says what its own source was.

use serde_json::{Map, Value, json};

use crate::notification::Call;

/// SHUT_WR: a half-close of a connection, of which the agent need not hear.
pub const SHUT_WR: u32 = 1;

/// What goes around the filter.
const AROUND: [&str; 4] = ["socketcall", "io_uring_enter", "io_uring_register", "io_uring_setup"];

/// MSG_FASTOPEN, and which argument of the sending calls the flags are.
const FASTOPEN: u32 = 0x2000_0000;
const SENDS: [(&str, u32); 3] = [("sendmmsg", 3), ("sendmsg", 2), ("sendto", 3)];

const CONNECT: &str = "connect";

const ALLOW: &str = "SCMP_ACT_ALLOW";
const LOG: &str = "SCMP_ACT_LOG";
const ERRNO: &str = "SCMP_ACT_ERRNO";
const NOTIFY: &str = "SCMP_ACT_NOTIFY";

/// What runtimes take where a profile has no flags (crun, runc), so it has to be said as soon as it has one.
const SPEC_ALLOW: &str = "SECCOMP_FILTER_FLAG_SPEC_ALLOW";
/// A signal that the caller handles does not break its call off while the agent is at work.
const WAIT_KILLABLE: &str = "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV";

/// What a profile is made of.
#[derive(Debug, Clone, Copy)]
pub struct WantedProfile<'a> {
    /// The other profile's text.
    pub source: &'a str,
    /// Where the agent listens: an absolute path.
    pub listener_path: &'a str,
    /// What the runtime passes on to it (`metadata` of the container process state).
    pub listener_metadata: &'a str,
    /// May SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV be asked for? It takes Linux 5.19, and crun 1.6 or runc 1.2: older ones start no container
    /// with it.
    pub wait_killable: bool,
}

/// May the container's processes connect?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Connecting {
    /// As in the other profile.
    AsBefore,
    /// Not at all, not even to a unix socket or to another of its own services: connect(2) fails with EPERM. Then no socket of the host's is
    /// dissolved or led elsewhere, and it takes no right to forbid that.
    Never,
}

/// Why no profile can be made.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    /// It is no JSON object, or its fields are no profile's.
    #[error("it is no seccomp profile: {0}")]
    Unreadable(String),
    /// What it forbids cannot be asked of the agent, which would have it done.
    #[error("it does not let the container {0}(2), so there is nothing to adopt")]
    Forbids(&'static str),
    /// What it says of a call would not be kept.
    #[error(
        "what it says of {0}(2) depends on arguments or capabilities, and that is lost when the agent is asked"
    )]
    Depends(&'static str),
    /// It has an agent already, or needs one.
    #[error("it notifies another program, and only one can be told of a container's system calls")]
    Notifies,
}

/// The profile of a container that connects as before. The same text is made of the same.
///
/// # Errors
/// [`Unfit`].
pub fn profile(wanted: &WantedProfile<'_>) -> Result<String, Unfit> {
    profile_with(wanted, Connecting::AsBefore)
}

/// The profile.
///
/// # Errors
/// [`Unfit`].
pub fn profile_with(wanted: &WantedProfile<'_>, connecting: Connecting) -> Result<String, Unfit> {
    let mut profile: Map<String, Value> = serde_json::from_str(wanted.source).map_err(unreadable)?;
    let mut rules = Rules::of(&mut profile)?;
    // Without a listener such rules fail; with one, the agent would allow what they are about.
    if profile.contains_key("listenerPath") || rules.notify() {
        return Err(Unfit::Notifies);
    }
    for call in [Call::Bind, Call::Listen] {
        rules.permission(call.name())?.ok_or(Unfit::Forbids(call.name()))?;
        rules.forget(call.name());
        rules.add(json!({ "names": [call.name()], "action": NOTIFY }));
    }
    notify_shutdown(&mut rules)?;
    refuse_fast_open(&mut rules)?;
    if connecting == Connecting::Never {
        rules.forget(CONNECT);
        // Runtimes refuse a rule that says what is so by default; the default error is EPERM.
        let number = profile.get("defaultErrnoRet").and_then(Value::as_u64).unwrap_or(1);
        if (rules.default.as_str(), number) != (ERRNO, 1) {
            rules.add(json!({ "names": [CONNECT], "action": ERRNO, "errnoRet": 1, "errno": "EPERM" }));
        }
    }
    for name in AROUND {
        rules.forget(name);
    }
    if rules.permit_by_default() {
        rules.add(json!({ "names": AROUND, "action": ERRNO, "errnoRet": 38, "errno": "ENOSYS" }));
    }
    native_only(&mut profile);
    if wanted.wait_killable {
        let flags = flags(profile.remove("flags"))?;
        profile.insert("flags".to_owned(), flags.into());
    }
    profile.insert("listenerMetadata".to_owned(), wanted.listener_metadata.into());
    profile.insert("listenerPath".to_owned(), wanted.listener_path.into());
    profile.insert("syscalls".to_owned(), rules.rules.into());
    let text = serde_json::to_string_pretty(&profile).map_err(unreadable)?;
    Ok(text + "\n")
}

fn unreadable(error: serde_json::Error) -> Unfit {
    Unfit::Unreadable(error.to_string())
}

/// Where it is forbidden it ends no listener, and stays so.
fn notify_shutdown(rules: &mut Rules) -> Result<(), Unfit> {
    let name = Call::Shutdown.name();
    let Some(action) = rules.permission(name)? else { return Ok(()) };
    rules.forget(name);
    let how = |op: &str| json!([{ "index": 1, "value": SHUT_WR, "op": op }]);
    rules.permit(name, &action, how("SCMP_CMP_EQ"));
    rules.add(json!({ "names": [name], "action": NOTIFY, "args": how("SCMP_CMP_NE") }));
    Ok(())
}

/// With the error of a kernel that has no TCP Fast Open. The flags are words of 32 bits for the kernel, and this one bit is all that is compared.
fn refuse_fast_open(rules: &mut Rules) -> Result<(), Unfit> {
    for (name, index) in SENDS {
        let Some(action) = rules.permission(name)? else { continue };
        rules.forget(name);
        let flags = |value: u32| json!([{ "index": index, "value": FASTOPEN, "valueTwo": value, "op": "SCMP_CMP_MASKED_EQ" }]);
        rules.permit(name, &action, flags(0));
        let args = flags(FASTOPEN);
        rules.add(
            json!({ "names": [name], "action": ERRNO, "errnoRet": 95, "errno": "EOPNOTSUPP", "args": args }),
        );
    }
    Ok(())
}

/// A 32-bit call would be another call, and has other arguments.
fn native_only(profile: &mut Map<String, Value>) {
    for native in profile.get_mut("archMap").and_then(Value::as_array_mut).into_iter().flatten() {
        if let Some(native) = native.as_object_mut() {
            native.insert("subArchitectures".to_owned(), json!([]));
        }
    }
    // The older way to say the same; without a list the native one is meant.
    profile.remove("architectures");
}

/// The source's, or what runtimes take where it has none, and the one that is wanted.
fn flags(source: Option<Value>) -> Result<Vec<String>, Unfit> {
    let source: Option<Vec<String>> =
        source.map(serde_json::from_value).transpose().map_err(unreadable)?.flatten();
    let mut flags = source.filter(|flags| !flags.is_empty()).unwrap_or_else(|| vec![SPEC_ALLOW.to_owned()]);
    flags.retain(|flag| flag != WAIT_KILLABLE);
    flags.push(WAIT_KILLABLE.to_owned());
    Ok(flags)
}

/// The rules of a profile.
struct Rules {
    rules: Vec<Value>,
    default: String,
}

impl Rules {
    /// Takes them out of it.
    fn of(profile: &mut Map<String, Value>) -> Result<Self, Unfit> {
        let default = profile.get("defaultAction").and_then(Value::as_str).map(str::to_owned);
        let default = default.ok_or_else(|| Unfit::Unreadable("there is no defaultAction".to_owned()))?;
        let rules: Option<Vec<Value>> =
            profile.remove("syscalls").map(serde_json::from_value).transpose().map_err(unreadable)?.flatten();
        Ok(Self { rules: rules.unwrap_or_default(), default })
    }

    fn notify(&self) -> bool {
        self.default == NOTIFY || self.rules.iter().any(|rule| action(rule) == Some(NOTIFY))
    }

    fn permit_by_default(&self) -> bool {
        permits(&self.default)
    }

    /// The action by which the call is permitted, whatever its arguments are and whoever makes it; `None` where it is forbidden in the same way.
    fn permission(&self, name: &'static str) -> Result<Option<String>, Unfit> {
        let own: Vec<&Value> =
            self.rules.iter().filter(|rule| names(rule).any(|other| other == name)).collect();
        let always = own.iter().find(|rule| is_unconditional(rule)).and_then(|rule| action(rule));
        let whatever = always.unwrap_or(&self.default);
        let permitted = permits(whatever);
        if own.iter().any(|rule| action(rule).is_some_and(permits) != permitted) {
            return Err(Unfit::Depends(name));
        }
        Ok(permitted.then(|| whatever.to_owned()))
    }

    /// Takes the call out of every rule.
    fn forget(&mut self, name: &str) {
        for rule in self.rules.iter_mut().filter_map(Value::as_object_mut) {
            if rule.get("name").and_then(Value::as_str) == Some(name) {
                rule.remove("name");
            }
            if let Some(names) = rule.get_mut("names").and_then(Value::as_array_mut) {
                names.retain(|other| other.as_str() != Some(name));
            }
        }
        self.rules.retain(|rule| names(rule).next().is_some());
    }

    /// Runtimes refuse a rule that says what is so by default.
    fn permit(&mut self, name: &str, action: &str, args: Value) {
        if action != self.default {
            self.add(json!({ "names": [name], "action": action, "args": args }));
        }
    }

    fn add(&mut self, rule: Value) {
        self.rules.push(rule);
    }
}

fn permits(action: &str) -> bool {
    [ALLOW, LOG].contains(&action)
}

fn names(rule: &Value) -> impl Iterator<Item = &str> {
    // The older form names one call.
    let one = rule.get("name").and_then(Value::as_str).filter(|name| !name.is_empty());
    let list = rule.get("names").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
    one.into_iter().chain(list)
}

fn action(rule: &Value) -> Option<&str> {
    rule.get("action").and_then(Value::as_str)
}

fn is_unconditional(rule: &Value) -> bool {
    let is_empty = |key: &str| match rule.get(key) {
        None | Some(Value::Null) => true,
        Some(Value::Array(list)) => list.is_empty(),
        Some(Value::Object(fields)) => fields.values().all(|list| list.as_array().is_some_and(Vec::is_empty)),
        Some(_) => false,
    };
    ["args", "includes", "excludes"].into_iter().all(is_empty)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// In the form of containers-common's.
    const SOURCE: &str = r#"{
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": 38,
        "archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86", "SCMP_ARCH_X32"]}],
        "syscalls": [
            {"names": ["accept", "bind", "io_uring_setup", "listen", "read", "sendmmsg", "sendmsg", "sendto", "shutdown", "socketcall"],
             "action": "SCMP_ACT_ALLOW", "args": [], "comment": "", "includes": {}, "excludes": {}},
            {"names": ["socketcall"], "action": "SCMP_ACT_ALLOW"},
            {"name": "io_uring_enter", "action": "SCMP_ACT_ALLOW"},
            {"names": ["bpf"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_BPF"]}}
        ]
    }"#;

    fn wanted(source: &str) -> WantedProfile<'_> {
        WantedProfile { source, listener_path: "/run/agent", listener_metadata: "web", wait_killable: true }
    }

    fn made(source: &str) -> Value {
        serde_json::from_str(&profile(&wanted(source)).unwrap()).unwrap()
    }

    fn refused(source: &str) -> String {
        profile(&wanted(source)).unwrap_err().to_string()
    }

    /// Which actions the profile has for a call with these words, the default one where no rule is for it. A condition on capabilities is
    /// fulfilled, or none is.
    fn actions(profile: &Value, name: &str, words: [u64; 4], capable: bool) -> Vec<String> {
        let holds = |condition: &Value| {
            let number = |key: &str| condition[key].as_u64().unwrap_or(0);
            let (word, value) = (words[usize::try_from(number("index")).unwrap()], number("value"));
            match condition["op"].as_str().unwrap() {
                "SCMP_CMP_EQ" => word == value,
                "SCMP_CMP_NE" => word != value,
                "SCMP_CMP_MASKED_EQ" => word & value == number("valueTwo"),
                other => panic!("{other}"),
            }
        };
        let applies = |rule: &&Value| {
            names(rule).any(|other| other == name)
                && (capable || rule["includes"]["caps"].is_null())
                && rule["args"].as_array().is_none_or(|conditions| conditions.iter().all(holds))
        };
        let rules = profile["syscalls"].as_array().into_iter().flatten().filter(applies);
        let own: Vec<String> = rules.map(|rule| action(rule).unwrap().to_owned()).collect();
        if own.is_empty() { vec![profile["defaultAction"].as_str().unwrap().to_owned()] } else { own }
    }

    /// All that is asked of a profile, with what its source says of the same call.
    fn check(source: &Value, made: &Value) -> Result<(), TestCaseError> {
        let rest = ["read", "accept", "bpf", "mount"];
        let sends = SENDS.map(|(name, _)| name);
        let names = Call::ALL.map(Call::name).into_iter().chain(sends).chain(AROUND).chain(rest);
        let words = [0, 1, 2, 3, u64::from(FASTOPEN), u64::from(FASTOPEN) | 0x4000, 1 << 32 | 1, u64::MAX];
        for (name, word, capable) in
            names.flat_map(|name| words.map(|word| [(name, word, false), (name, word, true)])).flatten()
        {
            let now = actions(made, name, [word; 4], capable);
            let before = actions(source, name, [word; 4], capable);
            if rest.contains(&name) {
                prop_assert_eq!(now, before, "{}", name);
                continue;
            }
            // No two rules are for one call: there would be no saying which counts.
            let first = &now[0];
            prop_assert!(
                now.iter().all(|other| permits(other) == permits(first)),
                "{} {} {:?}",
                name,
                word,
                now
            );
            let permitted = before.iter().all(|action| permits(action));
            let notified = Call::ALL.into_iter().any(|call| call.name() == name);
            if AROUND.contains(&name) {
                prop_assert!(!permits(first), "{}", name);
            } else if !permitted {
                prop_assert!(!permits(first) && first != NOTIFY, "{} {}", name, word);
            } else if notified && !(name == "shutdown" && word == u64::from(SHUT_WR)) {
                prop_assert_eq!(now, [NOTIFY], "{} {}", name, word);
            } else {
                let connects = !notified && word & u64::from(FASTOPEN) != 0;
                prop_assert_eq!(permits(first), !connects, "{} {}", name, word);
            }
        }
        for native in made["archMap"].as_array().into_iter().flatten() {
            prop_assert_eq!(&native["subArchitectures"], &json!([]));
        }
        prop_assert!(made["architectures"].is_null());
        Ok(())
    }

    #[test]
    fn the_agent_is_told_and_nothing_is_permitted_besides() {
        // This machine's own, if it has Podman.
        let machine = std::fs::read_to_string("/usr/share/containers/seccomp.json");
        for source in [Ok(SOURCE.to_owned()), machine].into_iter().flatten() {
            let made = made(&source);
            let source: Value = serde_json::from_str(&source).unwrap();
            check(&source, &made).unwrap();
            for (name, words, action) in [
                ("bind", [0; 4], NOTIFY),
                ("listen", [0; 4], NOTIFY),
                ("shutdown", [3, 0, 0, 0], NOTIFY),
                ("shutdown", [3, 1, 0, 0], ALLOW),
                ("shutdown", [3, 2, 0, 0], NOTIFY),
                ("sendto", [3, 0, 0, 0x4000], ALLOW),
                ("sendto", [3, 0, 0, 0x2000_4000], ERRNO),
                ("sendmsg", [3, 0, 0x2000_0000, 0], ERRNO),
                ("sendmsg", [3, 0, 0, 0x2000_0000], ALLOW),
                ("sendmmsg", [3, 0, 0, 0x2000_0000], ERRNO),
            ] {
                assert_eq!(actions(&made, name, words, false), [action], "{name} {words:?}");
            }
            assert_eq!(made["listenerPath"], "/run/agent");
            assert_eq!(made["listenerMetadata"], "web");
            assert_eq!(made["defaultErrnoRet"], source["defaultErrnoRet"]);
        }
    }

    #[test]
    fn a_profile_that_permits_what_it_does_not_name_gets_no_rule_that_says_so() {
        let made = made(r#"{"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86"]}"#);
        let all: Vec<&str> = made["syscalls"].as_array().unwrap().iter().filter_map(action).collect();
        assert!(!all.contains(&ALLOW), "{all:?}");
        assert_eq!(actions(&made, "shutdown", [3, 1, 0, 0], false), [ALLOW]);
        assert_eq!(actions(&made, "io_uring_setup", [0; 4], false), [ERRNO]);
        assert!(made["architectures"].is_null());
    }

    #[test]
    fn a_flag_is_asked_for_where_it_may_be_and_what_goes_without_saying_stays() {
        let flags = |flags: &str, wait_killable: bool| {
            let source = SOURCE.replacen('{', &format!("{{\"flags\": {flags},"), 1);
            let made = profile(&WantedProfile { wait_killable, ..wanted(&source) }).unwrap();
            serde_json::from_str::<Value>(&made).unwrap()["flags"].clone()
        };
        assert_eq!(made(SOURCE)["flags"], json!([SPEC_ALLOW, WAIT_KILLABLE]));
        assert_eq!(flags("[]", true), json!([SPEC_ALLOW, WAIT_KILLABLE]));
        assert_eq!(
            flags(r#"["SECCOMP_FILTER_FLAG_LOG"]"#, true),
            json!(["SECCOMP_FILTER_FLAG_LOG", WAIT_KILLABLE])
        );
        assert_eq!(flags("null", false), Value::Null);
        let without = profile(&WantedProfile { wait_killable: false, ..wanted(SOURCE) }).unwrap();
        assert!(!without.contains("flags"), "{without}");
    }

    #[test]
    fn a_container_that_never_connects_has_one_rule_for_it() {
        let with = SOURCE.replace("\"accept\", ", "\"accept\", \"connect\", ");
        let allowing = r#"{"defaultAction": "SCMP_ACT_ALLOW"}"#;
        for source in [with.as_str(), SOURCE, allowing] {
            let text = profile_with(&wanted(source), Connecting::Never).unwrap();
            let made: Value = serde_json::from_str(&text).unwrap();
            assert_eq!(actions(&made, CONNECT, [0; 4], true), [ERRNO]);
            let rules = made["syscalls"].as_array().unwrap();
            let rule = rules.iter().find(|rule| names(rule).any(|name| name == CONNECT)).unwrap();
            assert_eq!((&rule["errnoRet"], names(rule).count()), (&json!(1), 1));
            // All else is as it was.
            check(&serde_json::from_str(source).unwrap(), &made).unwrap();
        }
        assert_eq!(actions(&made(&with), CONNECT, [0; 4], false), [ALLOW]);
        // Where that is the default there is none.
        let text = profile_with(&wanted(&with.replace("38", "1")), Connecting::Never).unwrap();
        assert!(!text.contains("\"connect\""), "{text}");
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let without = |name: &str| SOURCE.replace(&format!("\"{name}\", "), "");
        assert_eq!(
            refused(&without("listen")),
            "it does not let the container listen(2), so there is nothing to adopt"
        );
        assert_eq!(profile(&wanted(&without("bind"))), Err(Unfit::Forbids("bind")));
        // A container that may not shut a socket down ends no listener.
        let deaf = profile(&wanted(&without("shutdown"))).unwrap();
        assert!(!deaf.contains("\"shutdown\""), "{deaf}");
        let with = |rule: &str| SOURCE.replacen("\"syscalls\": [", &format!("\"syscalls\": [{rule},"), 1);
        assert_eq!(
            refused(&with(
                r#"{"names": ["shutdown"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 1, "value": 2, "op": "SCMP_CMP_EQ"}]}"#
            )),
            "what it says of shutdown(2) depends on arguments or capabilities, and that is lost when the agent is asked"
        );
        for notifies in [
            SOURCE.replacen('{', "{\"listenerPath\": \"/other\",", 1),
            SOURCE.replacen("SCMP_ACT_ERRNO", NOTIFY, 1),
            with(r#"{"names": ["mount"], "action": "SCMP_ACT_NOTIFY"}"#),
            profile(&wanted(SOURCE)).unwrap(),
        ] {
            assert_eq!(
                refused(&notifies),
                "it notifies another program, and only one can be told of a container's system calls"
            );
        }
        for (text, why) in [
            ("", "it is no seccomp profile: EOF while parsing a value at line 1 column 0"),
            ("{}", "it is no seccomp profile: there is no defaultAction"),
        ] {
            assert_eq!(refused(text), why);
        }
        for text in
            ["[]", "{\"defaultAction\": 7}", "{\"defaultAction\": \"SCMP_ACT_ALLOW\", \"syscalls\": 7}"]
        {
            assert!(refused(text).starts_with("it is no seccomp profile: "), "{text}");
        }
        let flags = SOURCE.replacen('{', "{\"flags\": 7,", 1);
        assert!(matches!(profile(&wanted(&flags)), Err(Unfit::Unreadable(_))));
    }

    fn rule() -> impl Strategy<Value = Value> {
        let all = [
            "bind",
            "listen",
            "shutdown",
            "sendto",
            "sendmsg",
            "sendmmsg",
            "socketcall",
            "io_uring_enter",
            "read",
            "bpf",
        ];
        let operator = prop::sample::select(vec!["SCMP_CMP_EQ", "SCMP_CMP_NE", "SCMP_CMP_MASKED_EQ"]);
        let condition = (0_u32..4, 0_u32..4, operator).prop_map(
            |(index, value, op)| json!([{ "index": index, "value": value, "valueTwo": value, "op": op }]),
        );
        let args = prop_oneof![6 => Just(Value::Null), 1 => condition];
        let caps = prop_oneof![6 => Just(json!({})), 1 => Just(json!({ "caps": ["CAP_NET_ADMIN"] }))];
        let action =
            prop_oneof![6 => Just(ALLOW), 1 => Just(LOG), 1 => Just(ERRNO), 1 => Just("SCMP_ACT_KILL")];
        let names = prop_oneof![
            prop::sample::subsequence(all.to_vec(), 1..5).prop_map(|names| json!({ "names": names })),
            prop::sample::select(all.to_vec()).prop_map(|name| json!({ "name": name })),
        ];
        (names, action, args, caps).prop_map(|(mut rule, action, args, caps)| {
            rule["action"] = action.into();
            rule["args"] = args;
            rule["includes"] = caps;
            rule
        })
    }

    proptest! {
        /// Whatever a source says: what is made of it holds, or it is refused for what it says.
        #[test]
        fn no_container_may_more_than_before(
            default in prop::sample::select(vec![ALLOW, LOG, ERRNO, "SCMP_ACT_KILL_PROCESS"]),
            rules in prop::collection::vec(rule(), 0..6),
        ) {
            let source = json!({ "defaultAction": default, "syscalls": rules });
            let text = source.to_string();
            match profile(&wanted(&text)) {
                Ok(made) => {
                    prop_assert_eq!(&profile(&wanted(&text)).unwrap(), &made);
                    check(&source, &serde_json::from_str(&made).unwrap())?;
                }
                Err(Unfit::Forbids(name)) => {
                    prop_assert!(actions(&source, name, [0; 4], true).iter().all(|action| !permits(action)));
                }
                Err(why) => {
                    let Unfit::Depends(name) = why else { panic!("{why}") };
                    prop_assert!(rules.iter().any(|rule| names(rule).any(|other| other == name)));
                }
            }
        }
    }
}
