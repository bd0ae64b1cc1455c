//! `--idle-below=1K/1min`, as it is written.

use bro_relay::rate::{LONGEST, Rate, SHORTEST, SUFFIXES};

use crate::systemd::time_span::TimeSpan;

/// Why a text is not a rate.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidRate {
    /// Not of the form at all.
    #[error("“{0}” is not BYTES/TIME; write for example 1K/1min")]
    Form(String),
    /// Before the slash.
    #[error(
        "“{0}” is not a number of bytes from 1 on; write for example 512, 1K, 64K or 1M (K, M and G of 1024)"
    )]
    Bytes(String),
    /// Behind it.
    #[error("the time behind the slash: {0}")]
    Time(#[from] crate::systemd::time_span::InvalidTimeSpan),
    /// Too short or too long.
    #[error("the time behind the slash is from 100ms to 1d")]
    Range,
}

/// Reads a rate.
///
/// # Errors
/// For what is none.
pub fn rate(text: &str) -> Result<Rate, InvalidRate> {
    let (bytes, within) = text.split_once('/').ok_or_else(|| InvalidRate::Form(text.to_owned()))?;
    let bad = || InvalidRate::Bytes(bytes.to_owned());
    let suffix = SUFFIXES.into_iter().find_map(|(c, factor)| Some((bytes.strip_suffix(c)?, factor)));
    let (digits, factor) = suffix.unwrap_or((bytes, 1));
    // parse() would take a sign.
    if !digits.starts_with(|c: char| c.is_ascii_digit()) {
        return Err(bad());
    }
    let count: u64 = digits.parse().map_err(|_| bad())?;
    let bytes = count.checked_mul(factor).filter(|&bytes| bytes > 0).ok_or_else(bad)?;
    let within = within.parse::<TimeSpan>()?.finite().ok_or(InvalidRate::Range)?;
    if !(SHORTEST..=LONGEST).contains(&within) {
        return Err(InvalidRate::Range);
    }
    Ok(Rate { bytes, within })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_what_it_writes() {
        for text in ["1K/1min", "1/100ms", "1025/90s", "3M/1.5s", "64K/24h", "1G/2h"] {
            assert_eq!(rate(text).unwrap().to_string(), text);
        }
        assert_eq!(rate("1024/60"), rate("1K/1min"));
        assert_eq!(rate("1K/1min").unwrap(), Rate { bytes: 1024, within: Duration::from_secs(60) });
    }

    #[test]
    fn refuses_with_the_reason() {
        let refused = |text: &str| rate(text).unwrap_err();
        assert_eq!(refused("1K"), InvalidRate::Form("1K".into()));
        for bytes in ["", "K", "0", "+1", "-1", "1k", "1.5K", "18446744073709551615K"] {
            assert_eq!(refused(&format!("{bytes}/1min")), InvalidRate::Bytes(bytes.into()));
        }
        assert!(
            matches!(refused("1K/"), InvalidRate::Time(_))
                && matches!(refused("1K/soon"), InvalidRate::Time(_))
        );
        for time in ["0", "99ms", "25h", "infinity"] {
            assert_eq!(refused(&format!("1/{time}")), InvalidRate::Range);
        }
    }

    proptest! {
        #[test]
        fn never_panics(text in "\\PC{0,16}") {
            rate(text.as_str()).ok();
        }

        #[test]
        fn what_it_writes_is_read_back(bytes in 1..u64::MAX, ms in 100_u64..86_400_000) {
            let meant = Rate { bytes, within: Duration::from_millis(ms) };
            prop_assert_eq!(rate(&meant.to_string()), Ok(meant));
        }

    }
}
