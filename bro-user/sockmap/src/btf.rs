//! Where the running kernel keeps the few fields the programs read: its own description of its types (BTF,
//! Documentation/bpf/btf.rst) says so. Only structures, unions and enums are looked at.

use std::collections::HashMap;

/// Why the offsets could not be found.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BtfError {
    /// The bytes end early or are of another format.
    #[error("the kernel's BTF is malformed at byte {0}")]
    Malformed(usize),
    /// This kernel has no such type or field.
    #[error("the kernel's BTF has no {0}")]
    Missing(String),
}

/// The offsets in bytes, from the start of `struct tcp_sock` where nothing else is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offsets {
    /// `write_seq`.
    pub write_seq: u32,
    /// `copied_seq`.
    pub copied_seq: u32,
    /// `icsk_ulp_ops`.
    pub ulp_ops: u32,
    /// `sk_socket`.
    pub sk_socket: u32,
    /// `file` in `struct socket`.
    pub socket_file: u32,
    /// `f_flags` in `struct file`.
    pub file_flags: u32,
    /// `skc_flags`.
    pub sk_flags: u32,
    /// The bit of SOCK_ZEROCOPY in it; 64 if there is none.
    pub zerocopy_bit: u32,
    /// `skc_prot`; 0 together with the next if this kernel does not have them.
    pub sk_prot: u32,
    /// `memory_pressure` in `struct proto`.
    pub memory_pressure: u32,
    /// `sk_uid`.
    pub sk_uid: u32,
}

impl Offsets {
    /// Finds them in the kernel's BTF.
    ///
    /// # Errors
    /// When it is malformed, or lacks the fields without which there is no kernel relay.
    pub fn find(btf: &[u8]) -> Result<Self, BtfError> {
        let btf = Btf::parse(btf)?;
        // Each step is asked for by name, so that a kernel that moves one of them says so instead of misleading us.
        let inet = btf.offset("tcp_sock", "inet_conn")?;
        let sk = inet + btf.offset("inet_connection_sock", "icsk_inet")? + btf.offset("inet_sock", "sk")?;
        let common = sk + btf.offset("sock", "__sk_common")?;
        let proto = btf
            .offset("sock_common", "skc_prot")
            .and_then(|prot| Ok((common + prot, btf.offset("proto", "memory_pressure")?)));
        let (sk_prot, memory_pressure) = proto.unwrap_or((0, 0));
        Ok(Self {
            write_seq: btf.offset("tcp_sock", "write_seq")?,
            copied_seq: btf.offset("tcp_sock", "copied_seq")?,
            ulp_ops: inet + btf.offset("inet_connection_sock", "icsk_ulp_ops")?,
            sk_socket: sk + btf.offset("sock", "sk_socket")?,
            socket_file: btf.offset("socket", "file")?,
            file_flags: btf.offset("file", "f_flags")?,
            sk_flags: common + btf.offset("sock_common", "skc_flags")?,
            zerocopy_bit: btf.enumerator("sock_flags", "SOCK_ZEROCOPY").unwrap_or(64),
            sk_prot,
            memory_pressure,
            sk_uid: sk + btf.offset("sock", "sk_uid")?,
        })
    }
}

// enum in include/uapi/linux/btf.h.
const INT: u32 = 1;
const ARRAY: u32 = 3;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const ENUM: u32 = 6;
const FUNC_PROTO: u32 = 13;
const VAR: u32 = 14;
const DATASEC: u32 = 15;
const DECL_TAG: u32 = 17;
const ENUM64: u32 = 19;

/// One type: where its members are, and how many.
#[derive(Clone, Copy)]
struct Type {
    kind: u32,
    members: usize,
    count: usize,
    has_bitfields: bool,
}

struct Btf<'a> {
    bytes: &'a [u8],
    strings: usize,
    types: Vec<Type>,
    /// Structures and enums by name. The first of a name wins, as in the kernel's own look-ups.
    named: HashMap<&'a [u8], usize>,
}

impl<'a> Btf<'a> {
    fn parse(bytes: &'a [u8]) -> Result<Self, BtfError> {
        const HEADER: usize = 24;
        const MAGIC: u32 = 0xeb9f;
        if word(bytes, 0)? & 0xffff != MAGIC {
            return Err(BtfError::Malformed(0));
        }
        let header = word(bytes, 4)? as usize;
        let types = header + word(bytes, 8)? as usize;
        let end = types + word(bytes, 12)? as usize;
        let strings = header + word(bytes, 16)? as usize;
        if header < HEADER || end > bytes.len() {
            return Err(BtfError::Malformed(4));
        }
        // Type 0 is void and not written down.
        let void = Type { kind: 0, members: 0, count: 0, has_bitfields: false };
        let mut btf = Self { bytes, strings, types: vec![void], named: HashMap::new() };
        let mut at = types;
        while at < end {
            let info = word(bytes, at + 4)?;
            let (kind, count) = (info >> 24 & 0x1f, (info & 0xffff) as usize);
            let this = Type { kind, members: at + 12, count, has_bitfields: info >> 31 != 0 };
            if matches!(kind, STRUCT | UNION | ENUM | ENUM64) {
                let name = btf.string(word(bytes, at)?)?;
                if !name.is_empty() && count > 0 {
                    btf.named.entry(name).or_insert(btf.types.len());
                }
            }
            btf.types.push(this);
            at += 12
                + match kind {
                    INT | VAR | DECL_TAG => 4,
                    ARRAY => 12,
                    STRUCT | UNION | DATASEC | ENUM64 => 12 * count,
                    ENUM | FUNC_PROTO => 8 * count,
                    _ => 0,
                };
        }
        Ok(btf)
    }

    fn string(&self, offset: u32) -> Result<&'a [u8], BtfError> {
        let start = self.strings + offset as usize;
        let rest = self.bytes.get(start..).ok_or(BtfError::Malformed(start))?;
        let length = rest.iter().position(|&byte| byte == 0).ok_or(BtfError::Malformed(start))?;
        Ok(&rest[..length])
    }

    fn named(&self, name: &str) -> Result<Type, BtfError> {
        let id = self.named.get(name.as_bytes()).ok_or_else(|| BtfError::Missing(name.into()))?;
        Ok(self.types[*id])
    }

    /// The offset of `field` in bytes, also when it is a member of an unnamed structure or union inside.
    fn offset(&self, structure: &str, field: &str) -> Result<u32, BtfError> {
        let missing = || BtfError::Missing(format!("{structure}.{field}"));
        let bits =
            self.member(self.named(structure)?, field.as_bytes(), &mut Vec::new())?.ok_or_else(missing)?;
        // A bitfield that does not begin a byte could not be read as the programs read it.
        if bits % 8 == 0 { Ok(bits / 8) } else { Err(missing()) }
    }

    /// `seen` are the places of the structures that are being, or have been, looked into: what is inside itself is not C, and
    /// looking into it again and again would not end.
    fn member(&self, of: Type, field: &[u8], seen: &mut Vec<usize>) -> Result<Option<u32>, BtfError> {
        if !matches!(of.kind, STRUCT | UNION) || seen.contains(&of.members) || seen.len() > 64 {
            return Ok(None);
        }
        seen.push(of.members);
        for index in 0..of.count {
            let at = of.members + 12 * index;
            let name = self.string(word(self.bytes, at)?)?;
            let place = word(self.bytes, at + 8)?;
            let bits = if of.has_bitfields { place & 0xff_ffff } else { place };
            if name == field {
                return Ok(Some(bits));
            }
            if name.is_empty()
                && let Some(inner) = self.types.get(word(self.bytes, at + 4)? as usize)
                && let Some(found) = self.member(*inner, field, seen)?
            {
                return bits.checked_add(found).map(Some).ok_or(BtfError::Malformed(at));
            }
        }
        Ok(None)
    }

    fn enumerator(&self, of: &str, name: &str) -> Option<u32> {
        let of = self.named(of).ok()?;
        let stride = match of.kind {
            ENUM => 8,
            ENUM64 => 12,
            _ => return None,
        };
        (0..of.count).map(|index| of.members + stride * index).find_map(|at| {
            let found = self.string(word(self.bytes, at).ok()?).ok()?;
            (found == name.as_bytes()).then(|| word(self.bytes, at + 4).ok()).flatten()
        })
    }
}

fn word(bytes: &[u8], at: usize) -> Result<u32, BtfError> {
    let four = bytes.get(at..).and_then(|rest| rest.first_chunk::<4>()).ok_or(BtfError::Malformed(at))?;
    Ok(u32::from_ne_bytes(*four))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Builds BTF: strings and types as they come.
    #[derive(Default)]
    struct Builder {
        types: Vec<u8>,
        strings: Vec<u8>,
    }

    impl Builder {
        fn name(&mut self, name: &str) -> u32 {
            if self.strings.is_empty() {
                self.strings.push(0);
            }
            if name.is_empty() {
                return 0;
            }
            let at = self.strings.len();
            self.strings.extend(name.bytes().chain([0]));
            at as u32
        }

        fn structure(&mut self, name: &str, bitfields: bool, members: &[(&str, u32, u32)]) {
            let info = STRUCT << 24 | members.len() as u32 | u32::from(bitfields) << 31;
            let head = [self.name(name), info, 64];
            self.words(&head);
            for &(member, of, offset) in members {
                let words = [self.name(member), of, offset];
                self.words(&words);
            }
        }

        fn words(&mut self, words: &[u32]) {
            self.types.extend(words.iter().flat_map(|word| word.to_ne_bytes()));
        }

        fn finish(&self) -> Vec<u8> {
            let (types, strings) = (self.types.len() as u32, self.strings.len() as u32);
            let mut bytes: Vec<u8> = [0xeb9f | 1 << 16, 24, 0, types, types, strings]
                .iter()
                .flat_map(|word: &u32| word.to_ne_bytes())
                .collect();
            bytes.extend(&self.types);
            bytes.extend(&self.strings);
            bytes
        }
    }

    #[test]
    fn what_is_inside_itself_or_out_of_bounds_is_refused() {
        let mut builder = Builder::default();
        builder.structure("self", false, &[("", 1, 0), ("", 1, 0), ("", 1, 0)]);
        builder.structure("", false, &[("far", 0, 0xffff_fff8)]);
        builder.structure("outer", false, &[("", 2, 0xffff_fff8)]);
        let bytes = builder.finish();
        let btf = Btf::parse(&bytes).unwrap();
        assert_eq!(btf.offset("self", "x"), Err(BtfError::Missing("self.x".into())));
        assert!(matches!(btf.offset("outer", "far"), Err(BtfError::Malformed(_))));
    }

    #[test]
    fn fields_are_found_in_structures_inside_too() {
        let mut builder = Builder::default();
        builder.structure("", false, &[("deep", 0, 96)]);
        builder.structure("outer", false, &[("a", 0, 0), ("", 1, 64), ("b", 0, 256)]);
        builder.structure("bits", true, &[("flag", 0, 1 << 24 | 3), ("whole", 0, 32 << 24 | 32)]);
        let bytes = builder.finish();
        let btf = Btf::parse(&bytes).unwrap();
        assert_eq!(btf.offset("outer", "deep"), Ok(20));
        assert_eq!(btf.offset("outer", "b"), Ok(32));
        assert_eq!(btf.offset("bits", "whole"), Ok(4));
        assert_eq!(btf.offset("bits", "flag"), Err(BtfError::Missing("bits.flag".into())));
        assert_eq!(btf.offset("outer", "none"), Err(BtfError::Missing("outer.none".into())));
        assert_eq!(btf.offset("none", "b"), Err(BtfError::Missing("none".into())));
    }

    #[test]
    fn damaged_input_is_an_error_and_never_a_panic() {
        let mut builder = Builder::default();
        builder.structure("", false, &[("", 1, 0)]);
        builder.structure("loop", false, &[("", 1, 0)]);
        let bytes = builder.finish();
        assert!(Btf::parse(&bytes).unwrap().offset("loop", "x").is_err());
        for length in 0..bytes.len() {
            let cut = Btf::parse(&bytes[..length]).and_then(|btf| btf.offset("loop", "x"));
            assert!(cut.is_err());
        }
        assert_eq!(Offsets::find(b"not BTF at all, sorry"), Err(BtfError::Malformed(0)));
    }

    #[test]
    fn the_running_kernel_has_every_field() {
        let Ok(bytes) = std::fs::read("/sys/kernel/btf/vmlinux") else { return };
        let found = Offsets::find(&bytes).unwrap();
        assert!(found.write_seq > found.sk_socket && found.sk_socket > 0, "{found:?}");
        assert!(found.zerocopy_bit < 64 && found.sk_prot > 0 && found.memory_pressure > 0, "{found:?}");
    }
}
