//! Reading the kernel's own structures, at offsets that the loader takes from the running kernel's BTF.

use core::ffi::c_void;

use aya_ebpf::Global;
use aya_ebpf::helpers::bpf_skc_to_tcp_sock;
use aya_ebpf::helpers::generated::bpf_probe_read_kernel;
use bro_ebpf::Owners;

/// `tcp_sock.write_seq`.
#[unsafe(no_mangle)]
static WRITE_SEQ: Global<u32> = Global::new(0);
/// `tcp_sock.copied_seq`.
#[unsafe(no_mangle)]
static COPIED_SEQ: Global<u32> = Global::new(0);
/// `inet_connection_sock.icsk_ulp_ops`.
#[unsafe(no_mangle)]
static ULP_OPS: Global<u32> = Global::new(0);
/// `sock.sk_socket`.
#[unsafe(no_mangle)]
static SK_SOCKET: Global<u32> = Global::new(0);
/// `socket.file`.
#[unsafe(no_mangle)]
static SOCKET_FILE: Global<u32> = Global::new(0);
/// `file.f_flags`.
#[unsafe(no_mangle)]
static FILE_FLAGS: Global<u32> = Global::new(0);
/// O_NONBLOCK on this architecture.
#[unsafe(no_mangle)]
static NONBLOCK: Global<u32> = Global::new(0);
/// `sock_common.skc_flags`.
#[unsafe(no_mangle)]
static SK_FLAGS: Global<u32> = Global::new(0);
/// The bit number of SOCK_ZEROCOPY in it; 64 when the kernel has none.
#[unsafe(no_mangle)]
static ZEROCOPY_BIT: Global<u32> = Global::new(64);
/// `sock_common.skc_prot`; 0 when the next is not known.
#[unsafe(no_mangle)]
static SK_PROT: Global<u32> = Global::new(0);
/// `proto.memory_pressure`.
#[unsafe(no_mangle)]
static MEMORY_PRESSURE: Global<u32> = Global::new(0);
/// 1 when the user wants sockets in blocking mode hooked too.
#[unsafe(no_mangle)]
static HOOK_BLOCKING: Global<u32> = Global::new(0);

/// `sock.sk_uid`.
#[unsafe(no_mangle)]
static SK_UID: Global<u32> = Global::new(0);
/// Whose sockets are hooked. No user's, should the loader forget to say so.
#[unsafe(no_mangle)]
static OWNERS: Global<Owners> = Global::new(Owners::NO_USER);
/// How many records each seat has; 0 when there is one seat.
#[unsafe(no_mangle)]
static SEAT_RECORDS: Global<u32> = Global::new(0);

/// The seat that a record belongs to.
#[inline(always)]
pub fn seat_of(record: u32) -> u32 {
    bro_ebpf::seat_of(record, SEAT_RECORDS.load())
}

/// Whether sockets in blocking mode are hooked too.
#[inline(always)]
pub fn hook_blocking() -> bool {
    HOOK_BLOCKING.load() != 0
}

/// A full TCP socket, as a pointer the verifier lets us read the kernel's `struct tcp_sock` through.
#[derive(Clone, Copy)]
pub struct TcpSock(*const u8);

impl TcpSock {
    /// The TCP socket of a context's `sk`; `None` for anything else.
    #[inline(always)]
    pub fn of(sk: *mut c_void) -> Option<Self> {
        if sk.is_null() {
            return None;
        }
        // SAFETY: the helper takes a context's `sk`, checks what it is, and returns null for anything but TCP.
        let tcp = unsafe { bpf_skc_to_tcp_sock(sk) };
        (!tcp.is_null()).then_some(Self(tcp.cast_const().cast()))
    }

    /// The sequence number of the next byte it gives to TCP.
    #[inline(always)]
    pub fn write_seq(self) -> u32 {
        self.number(WRITE_SEQ.load())
    }

    /// The sequence number of the next byte that its owner reads.
    #[inline(always)]
    pub fn copied_seq(self) -> u32 {
        self.number(COPIED_SEQ.load())
    }

    #[inline(always)]
    fn number(self, offset: u32) -> u32 {
        // SAFETY: the offset is that of a u32 in this kernel's struct tcp_sock; the verifier checks it.
        let field = unsafe { self.0.add(offset as usize) };
        // SAFETY: as above. Volatile, because the kernel changes it.
        unsafe { field.cast::<u32>().read_volatile() }
    }

    /// Whether it belongs to whom the programs were loaded for. With a stack of its own for the ranges.
    #[inline(never)]
    pub fn is_ours(self) -> bool {
        let (owners, mut user) = (OWNERS.load(), 0u32);
        owners.are_everybody() || (read(self.0, SK_UID.load(), &mut user) && owners.hold(user))
    }

    /// Whether an upper-layer protocol, such as kernel TLS, is installed.
    #[inline(always)]
    pub fn has_ulp(self) -> bool {
        // SAFETY: the offset is that of a pointer in this kernel's struct tcp_sock; the verifier checks it.
        let field = unsafe { self.0.add(ULP_OPS.load() as usize) };
        // SAFETY: as above. Only compared with null.
        unsafe { field.cast::<u64>().read_volatile() != 0 }
    }

    /// Whether its owner made it non-blocking; `None` before it was accepted.
    #[inline(always)]
    pub fn nonblocking(self) -> Option<bool> {
        let socket = follow(self.0, SK_SOCKET.load())?;
        let file = follow(socket, SOCKET_FILE.load())?;
        let mut flags = 0u32;
        read(file, FILE_FLAGS.load(), &mut flags).then_some(flags & NONBLOCK.load() != 0)
    }

    /// Whether its owner asked for MSG_ZEROCOPY.
    #[inline(always)]
    pub fn zerocopy(self) -> bool {
        let bit = ZEROCOPY_BIT.load();
        let mut flags = 0u64;
        bit < 64 && read(self.0, SK_FLAGS.load(), &mut flags) && flags >> (bit & 63) & 1 != 0
    }

    /// Whether TCP's memory is under pressure on this host.
    #[inline(always)]
    pub fn memory_pressure(self) -> bool {
        if SK_PROT.load() == 0 {
            return false;
        }
        let mut since = 0u64;
        let pressure = follow(self.0, SK_PROT.load()).and_then(|proto| follow(proto, MEMORY_PRESSURE.load()));
        pressure.is_some_and(|pressure| read(pressure, 0, &mut since) && since != 0)
    }
}

/// Reads a value from kernel memory; false when that memory cannot be read.
#[inline(always)]
fn read<T>(at: *const u8, offset: u32, into: &mut T) -> bool {
    let from = at.wrapping_add(offset as usize).cast();
    let into = core::ptr::from_mut(into).cast();
    // SAFETY: the helper checks the address it reads, and `into` is plain bytes of the size given.
    unsafe { bpf_probe_read_kernel(into, size_of::<T>() as u32, from) == 0 }
}

/// Reads a pointer from kernel memory; `None` when it is null or cannot be read.
#[inline(always)]
fn follow(at: *const u8, offset: u32) -> Option<*const u8> {
    let mut pointer = 0usize;
    (read(at, offset, &mut pointer) && pointer != 0).then_some(pointer as *const u8)
}
