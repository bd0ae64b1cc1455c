//! /etc/subuid (subuid(5)): which user ids a user may give to containers.

/// The ranges of the user, first id and count, from the file's text. A line gives its user's name or number.
pub(super) fn ranges(text: &str, uid: u32, name: &str) -> Vec<(u32, u32)> {
    text.lines().filter_map(|line| range(line, uid, name)).collect()
}

fn range(line: &str, uid: u32, name: &str) -> Option<(u32, u32)> {
    let mut fields = line.trim().split(':');
    let (owner, first, count) = (fields.next()?, fields.next()?, fields.next()?);
    let named = owner == name || owner.parse() == Ok(uid);
    // 0 would be root, or no id at all.
    let (first, count) = (first.parse::<u32>().ok()?, count.parse::<u32>().ok()?);
    (named && first > 0 && count > 0 && fields.next().is_none()).then_some((first, count))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_what_is_the_users_by_name_and_by_number() {
        let text = "alice:100000:65536\nbob:165536:65536\n1000:300000:1000\n# alice:1:1\n\n10001:5:5\n";
        assert_eq!(ranges(text, 1000, "alice"), [(100_000, 65536), (300_000, 1000)]);
        assert_eq!(ranges(text, 1001, "bob"), [(165_536, 65536)]);
        assert_eq!(ranges(text, 1002, "carol"), []);
    }

    #[test]
    fn takes_nothing_from_what_is_damaged() {
        for line in [
            "alice",
            "alice:",
            "alice:1",
            "alice:x:1",
            "alice:1:x",
            "alice:1:1:1",
            "alice:0:5",
            "alice:5:0",
            "alice:-1:5",
        ] {
            assert_eq!(ranges(line, 1000, "alice"), [], "{line}");
        }
    }
}
