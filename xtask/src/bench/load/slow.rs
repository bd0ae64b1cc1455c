//! Does it hurt others that some clients read slowly? Small requests alone, then beside four connections whose service
//! sends without end and whose client takes 64 KiB every 10 ms.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Result, anyhow};

use super::requests::Requests;
use super::{Args, Figures};
use crate::bench::clock;
use crate::bench::stream::{Address, Stream};
use crate::bench::wire::Ask;

const READERS: u64 = 4;
const PORTION: usize = 64 * 1024;
const PAUSE: Duration = Duration::from_millis(10);

pub fn measure(args: &Args) -> Result<Figures> {
    let half = Duration::from_secs_f64(args.seconds / 2.0);
    let mut requests = Requests::begin(&args.address, 64)?;
    requests.run(half / 5)?;
    let alone = requests.run(half)?;
    let (over, ready) = (AtomicBool::new(false), AtomicBool::new(false));
    let beside = std::thread::scope(|scope| {
        let readers = scope.spawn(|| read_slowly(&args.address, &over, &ready));
        // Until the readers' connections are full, as they then stay.
        while !ready.load(Ordering::Acquire) && !readers.is_finished() {
            if let Err(error) = requests.run(Duration::from_millis(1)) {
                over.store(true, Ordering::Release);
                return Err(error);
            }
        }
        let beside = requests.run(half);
        over.store(true, Ordering::Release);
        readers.join().map_err(|_| anyhow!("the slow readers broke"))??;
        beside
    })?;
    let mut figures = alone.figures("slow.alone");
    figures.extend(beside.figures("slow.beside"));
    Ok(figures)
}

fn read_slowly(address: &Address, over: &AtomicBool, ready: &AtomicBool) -> Result<()> {
    let mut readers = Vec::new();
    for number in 0..READERS {
        let stream = Stream::connect(address)?;
        stream.write_all(&Ask::Flood(clock::now() + number).encode())?;
        readers.push(stream);
    }
    let mut buffer = vec![0; PORTION];
    for portion in 0.. {
        if over.load(Ordering::Acquire) {
            break;
        }
        for reader in &readers {
            reader.read(&mut buffer)?;
        }
        ready.store(portion >= 3, Ordering::Release);
        // The slowness that is measured, not a wait for anything.
        std::thread::sleep(PAUSE);
    }
    Ok(())
}
