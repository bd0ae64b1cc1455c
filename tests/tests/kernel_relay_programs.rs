//! x
use bro_user::kernel::{Config, Kernel};
#[test]
fn loads() {
    let mut kernel = Kernel::load(&Config { connections: 16, hook_blocking: false }).unwrap();
    let own = bro_user::kernel::cgroup::of_self().unwrap();
    kernel.attach(&own).unwrap();
    println!("{:?}", kernel.totals());
}
