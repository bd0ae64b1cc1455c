//! The maps. Sizes are the loader's to set; the numbers here are placeholders that the kernel would accept.

use core::arch::asm;
use core::ffi::c_void;
use core::sync::atomic::AtomicU64;

use aya_ebpf::btf_maps::{Array, HashMap, RingBuf, SkStorage, SockHash};
use aya_ebpf::helpers::bpf_ringbuf_output;
use aya_ebpf::macros::btf_map;
use bro_ebpf::{
    About, Counter, Flow, RawEvent, RawProved, Record, Route, Sender, TargetKey, Watch, WatchKey,
};

/// `BPF_F_MMAPABLE`.
const MMAPABLE: usize = 1 << 10;

/// The lanes' records, shared with the forwarder by mmap.
#[btf_map]
pub static RECORDS: Array<Record, 64, MMAPABLE> = Array::new();
/// What the programs count in all, by [`Counter`].
#[btf_map]
pub static TOTALS: Array<AtomicU64, { Counter::COUNT }, MMAPABLE> = Array::new();
/// Which record a flow's sender uses. Written by the forwarder.
#[btf_map]
pub static ROUTES: HashMap<Flow, Route, 64> = HashMap::new();
/// Which ports to watch. Written by the forwarder; the programs learn the kind.
#[btf_map]
pub static WATCHED: HashMap<WatchKey, Watch, 64> = HashMap::new();
/// The hooked senders by socket cookie; `bro_send` is attached to this map, so it must not use it itself (a cycle of
/// references would keep both alive).
#[btf_map]
pub static SENDERS: SockHash<u64, 64> = SockHash::new();
/// The forwarder's sockets that senders may be redirected to. Has no program of its own.
#[btf_map]
pub static TARGETS: SockHash<TargetKey, 64> = SockHash::new();
/// What is known of a watched socket; goes with the socket.
#[btf_map]
pub static SENDER: SkStorage<Sender> = SkStorage::new();
/// What the loader writes down for forwarders, by [`About`]. The programs take no notice of it.
#[btf_map]
pub static ABOUT: Array<u64, { About::COUNT }> = Array::new();

/// Events for the forwarder in each seat: a ring buffer has one reader.
macro_rules! rings {
    ($($name:ident $seat:literal)*) => {
        $(#[btf_map]
        pub static $name: RingBuf<RawEvent, 4096> = RingBuf::new();)*

        /// The ring buffer of a seat; the first for what is none.
        #[inline(always)]
        fn ring(seat: u32) -> *mut c_void {
            match seat {
                $($seat => only(raw(&$name)),)*
                _ => only(raw(&EVENTS_00)),
            }
        }
    };
}

rings! {
    EVENTS_00 0 EVENTS_01 1 EVENTS_02 2 EVENTS_03 3 EVENTS_04 4 EVENTS_05 5 EVENTS_06 6 EVENTS_07 7
    EVENTS_08 8 EVENTS_09 9 EVENTS_10 10 EVENTS_11 11 EVENTS_12 12 EVENTS_13 13 EVENTS_14 14 EVENTS_15 15
}

/// Keeps the compiler from making a table of the ring buffers: the verifier wants each to be named by an instruction.
#[inline(always)]
fn only(mut map: *mut c_void) -> *mut c_void {
    // SAFETY: it does nothing.
    unsafe { asm!("{map} = {map}", map = inout(reg) map, options(nomem, nostack, preserves_flags)) };
    map
}

/// The map as the helpers want it.
#[inline(always)]
pub fn raw<M>(map: &'static M) -> *mut c_void {
    core::ptr::from_ref(map).cast_mut().cast()
}

/// Counts one.
#[inline(always)]
pub fn count(counter: Counter) {
    if let Some(total) = TOTALS.get(counter as u32) {
        add(total, 1);
    }
}

/// Tells the forwarder in a seat.
#[inline(always)]
pub fn tell(seat: u32, event: &RawEvent) {
    output(seat, event);
}

/// Tells the forwarder of a client that may be hooked; true if it will hear of that.
#[inline(always)]
pub fn tell_proved(seat: u32, event: &RawProved) -> bool {
    output(seat, event)
}

#[inline(always)]
fn output<T>(seat: u32, event: &T) -> bool {
    let data = core::ptr::from_ref(event).cast_mut().cast();
    // SAFETY: the events are plain bytes without padding, and the helper copies them before it returns.
    let sent = unsafe { bpf_ringbuf_output(ring(seat), data, size_of::<T>() as u64, 0) };
    if sent != 0 {
        count(Counter::EventsLost);
    }
    sent == 0
}

/// Adds to a number that other CPUs add to as well. In assembly, because Rust gives this target no read-modify-write.
#[inline(always)]
fn add(to: &AtomicU64, more: u64) {
    // SAFETY: one atomic instruction on a valid, aligned number.
    unsafe { asm!("lock *(u64 *)({to} + 0) += {more}", to = in(reg) to.as_ptr(), more = in(reg) more) };
}

/// Reads a number with a full barrier: what is read after it is at least as new as what was read before it.
#[inline(always)]
pub fn load_with_barrier(from: &AtomicU64) -> u64 {
    let mut value = 0u64;
    // SAFETY: one atomic instruction on a valid, aligned number; it adds nothing to it.
    unsafe {
        asm!(
            "{value} = atomic_fetch_add((u64 *)({from} + 0), {value})",
            from = in(reg) from.as_ptr(),
            value = inout(reg) value,
        );
    }
    value
}

/// Reads a number of the record: one load. (This target cannot compile an atomic one.)
#[inline(always)]
pub fn load(from: &AtomicU64) -> u64 {
    // SAFETY: the pointer is valid and aligned; an aligned load of a word is never torn.
    unsafe { from.as_ptr().read_volatile() }
}

/// Writes a number of the record: one store.
#[inline(always)]
pub fn store(to: &AtomicU64, value: u64) {
    // SAFETY: as above.
    unsafe { to.as_ptr().write_volatile(value) }
}
