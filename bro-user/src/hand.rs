//! `bro wake` and `bro sleep`: the service is woken and put to sleep by hand, through its forwarder.
