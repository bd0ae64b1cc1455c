//! The suite of relay behaviours, over every relay and every kind of connection. A further relay is one line more.
//!
//! Needs: a network namespace; root and kernel BTF for the lanes. Takes: 2 min.

/// No relay at all: shows that the suite asks for nothing but what a plain connection does.
mod direct {
    bro_tests::relay_suite!(Direct over tcp [tcp4: TCP4, tcp6: TCP6] and others [unix: UNIX]);
}

mod splice {
    bro_tests::relay_suite!(Splice);
}

mod copy {
    bro_tests::relay_suite!(Copy);
}

mod service_lane {
    bro_tests::relay_suite!(ServiceLane over tcp [tcp4: TCP4, tcp6: TCP6] and others [unix: UNIX]);
}

mod both_lanes {
    bro_tests::relay_suite!(BothLanes over tcp [tcp4: TCP4, tcp6: TCP6] and others []);
}

mod flapping_lanes {
    bro_tests::relay_suite!(FlappingLanes over tcp [tcp4: TCP4, tcp6: TCP6] and others []);
}
