//! Whose sockets the programs take hold of, and whose record it is.

use bro_ebpf::{Owners, SEATS, seat_of};
use proptest::prelude::*;

#[test]
fn the_user_and_the_users_of_containers_and_no_other() {
    let owners = Owners::of(1000, &[(100_000, 65_536), (300_000, 1)]);
    for held in [1000, 100_000, 165_535, 300_000] {
        assert!(owners.hold(held), "{held}");
    }
    for other in [0, 999, 1001, 99_999, 165_536, 299_999, 300_001, u32::MAX] {
        assert!(!owners.hold(other), "{other}");
    }
    assert!(!owners.are_everybody());
}

#[test]
fn no_user_and_every_user() {
    for user in [0, 1, 1000, u32::MAX - 1, u32::MAX] {
        assert!(!Owners::NO_USER.hold(user) && Owners::EVERYBODY.hold(user), "{user}");
    }
    assert!(Owners::EVERYBODY.are_everybody() && !Owners::NO_USER.are_everybody());
}

#[test]
fn a_damaged_range_gives_no_user_more() {
    // Neither root, nor what is beyond the last number, nor more ranges than there is room for.
    let many: Vec<(u32, u32)> = (1..20).map(|at| (at * 100_000, 10)).collect();
    assert!(!Owners::of(1000, &[(0, 65_536)]).hold(0));
    assert!(!Owners::of(1000, &[(5, 0)]).hold(5));
    let last = Owners::of(1000, &[(u32::MAX - 1, 65_536)]);
    assert!(last.hold(u32::MAX) && !last.hold(0) && !last.hold(3));
    let owners = Owners::of(1000, &many);
    assert!(owners.hold(100_000) && !owners.hold(1_900_000));
}

proptest! {
    #[test]
    fn only_what_is_in_a_range_is_held(user in 1u32.., first in 1u32.., count in 1u32.., asked: u32) {
        let inside = asked == user || asked >= first && u64::from(asked) < u64::from(first) + u64::from(count);
        prop_assert_eq!(Owners::of(user, &[(first, count)]).hold(asked), inside);
    }

    #[test]
    fn each_seat_has_its_own_records(each in 1u32..100_000, seat in 0u32..SEATS as u32, offset: u32) {
        prop_assert_eq!(seat_of(seat * each + offset % each, each), seat);
        prop_assert_eq!(seat_of(offset, 0), 0);
    }
}
