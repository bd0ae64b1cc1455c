//! x
use bro_user::kernel::{Config, Kernel};
#[test]
fn loads() {
    let t = std::time::Instant::now();
    let mut kernel = Kernel::load(&Config { connections: 16, hook_blocking: false }).unwrap();
    println!("load {:?}", t.elapsed());
    for _ in 0..5 {
    let t = std::time::Instant::now();
    let r = kernel.selftest();
    println!("selftest {:?}", t.elapsed());
    println!("{:?}", kernel.totals());
    r.unwrap();
    }
}
