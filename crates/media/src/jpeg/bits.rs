//! Bits of a scan and the Huffman codes in them.
//!
//! Data end at the next marker or the end of the file; whoever reads beyond gets zeros and is told by `is_overdrawn`.

use crate::error::Error;

/// Codes up to this length are found by one look into a table of 512 entries, which stays in the nearest cache.
const FAST_BITS: u32 = 9;

/// A Huffman code of up to 256 values.
pub(super) struct Huffman {
    /// By the next `FAST_BITS` bits: length and value of the code; length 0 where it is longer.
    fast: [(u8, u8); 1 << FAST_BITS],
    /// By length: one above the largest code, shifted to 16 bits.
    ends: [u32; 17],
    /// By length: what is added to a code to find its value.
    offsets: [i32; 17],
    values: Vec<u8>,
}

impl Huffman {
    /// `counts[i]` codes have i + 1 bits; `values` are in the order of codes.
    pub(super) fn new(counts: &[u8; 16], values: &[u8]) -> Result<Huffman, Error> {
        let (mut fast, mut ends, mut offsets) = ([(0, 0); 1 << FAST_BITS], [0; 17], [0; 17]);
        let (mut code, mut first) = (0_u32, 0_usize);
        for length in 1..=16_u32 {
            let count = usize::from(counts[length as usize - 1]);
            if code + count as u32 > 1 << length || first + count > 256 {
                return Err(Error::damaged("a Huffman table has more codes than there can be"));
            }
            offsets[length as usize] = first as i32 - code as i32;
            if length <= FAST_BITS {
                for (i, &value) in values[first..first + count].iter().enumerate() {
                    let start = (code as usize + i) << (FAST_BITS - length);
                    fast[start..start + (1 << (FAST_BITS - length))].fill((length as u8, value));
                }
            }
            first += count;
            code += count as u32;
            ends[length as usize] = code << (16 - length);
            code <<= 1;
        }
        Ok(Huffman { fast, ends, offsets, values: values.to_vec() })
    }
}

/// Reads the bits of one scan.
pub(super) struct Bits<'a> {
    data: &'a [u8],
    at: usize,
    /// The next bits, the first one uppermost.
    buffer: u64,
    held: u32,
    /// How many of those held are zeros beyond the data.
    padded: u32,
}

impl<'a> Bits<'a> {
    pub(super) fn new(data: &'a [u8]) -> Bits<'a> {
        Bits { data, at: 0, buffer: 0, held: 0, padded: 0 }
    }

    /// Holds 32 bits at least.
    fn fill(&mut self) {
        while self.held <= 56 {
            let byte = match self.data.get(self.at..) {
                Some([0xff, 0, ..]) => {
                    self.at += 2;
                    0xff
                }
                Some([byte, ..]) if *byte != 0xff => {
                    self.at += 1;
                    *byte
                }
                _ => {
                    self.padded += 8;
                    0
                }
            };
            self.buffer |= u64::from(byte) << (56 - self.held);
            self.held += 8;
        }
    }

    /// Whether bits were read that are not there.
    pub(super) fn is_overdrawn(&self) -> bool {
        self.padded > self.held
    }

    fn drop(&mut self, count: u32) {
        self.buffer <<= count;
        self.held -= count;
    }

    /// The next `count` bits, at most 16, as a number.
    pub(super) fn take(&mut self, count: u32) -> u32 {
        if count == 0 {
            return 0;
        }
        if self.held < 32 {
            self.fill();
        }
        let value = (self.buffer >> (64 - count)) as u32;
        self.drop(count);
        value
    }

    /// The next `count` bits as a signed number: those that begin with 0 are negative.
    pub(super) fn signed(&mut self, count: u32) -> i32 {
        let value = self.take(count) as i32;
        if count > 0 && value < 1 << (count - 1) { value - (1 << count) + 1 } else { value }
    }

    /// The value of the next code.
    pub(super) fn code(&mut self, table: &Huffman) -> Result<u8, Error> {
        if self.held < 32 {
            self.fill();
        }
        let (length, value) = table.fast[(self.buffer >> (64 - FAST_BITS)) as usize];
        if length > 0 {
            self.drop(length.into());
            return Ok(value);
        }
        let next = (self.buffer >> 48) as u32;
        for length in FAST_BITS + 1..=16 {
            if next < table.ends[length as usize] {
                let index = (next >> (16 - length)) as i32 + table.offsets[length as usize];
                self.drop(length);
                return usize::try_from(index).ok().and_then(|i| table.values.get(i)).copied().ok_or_else(unknown);
            }
        }
        Err(unknown())
    }

    /// Goes behind restart marker `number` (0 to 7), which has to come next; bits before it are padding.
    pub(super) fn restart(&mut self, number: usize) -> Result<(), Error> {
        let mut rest = self.data.get(self.at..).unwrap_or_default();
        // Any number of ff may stand before a marker.
        while let [0xff, 0xff, ..] = rest {
            rest = &rest[1..];
        }
        match rest {
            [0xff, marker, ..] if usize::from(*marker) == 0xd0 + number => {
                *self = Bits { data: self.data, at: self.data.len() - rest.len() + 2, buffer: 0, held: 0, padded: 0 };
                Ok(())
            }
            _ => Err(Error::damaged("a restart marker is missing in a scan")),
        }
    }

    /// Bytes of data before the next marker, all of which count as read.
    pub(super) fn end(mut self) -> usize {
        while let Some(rest) = self.data.get(self.at..) {
            match rest {
                [0xff, 0, ..] => self.at += 2,
                [0xff, ..] | [] => break,
                _ => self.at += 1,
            }
        }
        self.at
    }
}

fn unknown() -> Error {
    Error::damaged("a scan has a code that its table does not know")
}
