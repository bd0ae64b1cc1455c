//! Datagrams of one length go to the kernel together, which takes them apart where they leave or arrive (udp(7), UDP_SEGMENT), and come
//! from it together (UDP_GRO). Which ones may is decided here; pure.

/// The most datagrams in one (the kernel's UDP_MAX_SEGMENTS).
const MOST: usize = 64;

/// The most bytes of them all: as many as a datagram may have over IPv4, with 20 to spare for what a packet's header may have more.
const MOST_BYTES: usize = 65_487;

/// A datagram within what was received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// The number of the message that it came in.
    pub message: usize,
    /// Where it begins there.
    pub start: usize,
    /// Its bytes.
    pub length: usize,
}

impl Piece {
    /// The datagrams in a message of this length that the kernel has put together of ones of `segment` bytes, or (0) not.
    pub fn of(message: usize, length: usize, segment: usize) -> impl Iterator<Item = Self> {
        let step = if segment == 0 { length.max(1) } else { segment };
        let starts = (0..length.max(1)).step_by(step);
        starts.map(move |start| Self { message, start, length: step.min(length - start) })
    }
}

/// How many of the first of these go together, where datagrams of more than `longest` bytes do not: as many as are of one length,
/// and a last one that is shorter.
pub fn together(pieces: &[Piece], longest: usize) -> usize {
    let Some(&Piece { length: size, .. }) = pieces.first() else { return 0 };
    if size == 0 || size > longest {
        return 1;
    }
    let (mut count, mut bytes) = (1, size);
    for next in &pieces[1..pieces.len().min(MOST)] {
        if next.length == 0 || next.length > size || bytes + next.length > MOST_BYTES {
            break;
        }
        (count, bytes) = (count + 1, bytes + next.length);
        if next.length < size {
            break;
        }
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pieces(lengths: &[usize]) -> Vec<Piece> {
        lengths.iter().map(|length| Piece { message: 0, start: 0, length: *length }).collect()
    }

    #[test]
    fn a_shorter_one_is_the_last() {
        assert_eq!(together(&pieces(&[10, 10, 4, 10]), 1000), 3);
        assert_eq!(together(&pieces(&[10, 11]), 1000), 1);
        assert_eq!(together(&pieces(&[10, 0]), 1000), 1);
        assert_eq!(together(&pieces(&[0, 0]), 1000), 1);
        assert_eq!(together(&pieces(&[10, 10]), 9), 1);
        assert_eq!(together(&pieces(&[8192; 20]), 1 << 16), 7);
        assert_eq!(together(&pieces(&[1; 100]), 1 << 16), MOST);
        assert_eq!(together(&[], 1000), 0);
    }

    proptest! {
        #[test]
        fn the_kernel_takes_them_apart_as_they_were(lengths in proptest::collection::vec(0usize..5, 0..40), longest in 0usize..6) {
            let pieces = pieces(&lengths);
            let mut apart = Vec::new();
            let mut left = &pieces[..];
            while !left.is_empty() {
                let count = together(left, longest);
                prop_assert!((1..=MOST).contains(&count));
                let (run, rest) = left.split_at(count);
                let length = run.iter().map(|piece| piece.length).sum();
                // One by itself is sent as it is.
                let segment = if count == 1 { 0 } else { run[0].length };
                prop_assert!(segment <= longest);
                apart.extend(Piece::of(0, length, segment).map(|piece| piece.length));
                left = rest;
            }
            prop_assert_eq!(apart, lengths);
        }
    }
}
