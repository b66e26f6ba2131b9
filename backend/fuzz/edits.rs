//! Inputs as what differs from something real: a fuzzer would not guess a superblock, but finds what one byte of it does.
//!
//! ```text
//!   how many edits │ offset, 2 bytes │ what │ operands │ offset …
//! ```
//!
//! Behind the end of an input come numbers that follow from all of it: short inputs try something at random, long ones say what.

/// An input, taken from its front.
#[derive(Clone)]
pub struct Input<'a> {
    bytes: &'a [u8],
    state: u64,
}

impl<'a> Input<'a> {
    pub fn new(bytes: &'a [u8]) -> Input<'a> {
        let mix = |state: u64, byte: &u8| (state ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        Input { bytes, state: bytes.iter().fold(0xcbf2_9ce4_8422_2325, mix) | 1 }
    }

    /// What has not been taken.
    #[allow(dead_code, reason = "not every target has a use for it")]
    pub fn rest(&self) -> &'a [u8] {
        self.bytes
    }

    pub fn u8(&mut self) -> u8 {
        if let Some((first, rest)) = self.bytes.split_first() {
            self.bytes = rest;
            return *first;
        }
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        (self.state >> 32) as u8
    }

    /// How many edits: few, because what has many is refused for the first.
    pub fn edits(&mut self) -> u8 {
        [1, 1, 1, 1, 1, 2, 2, 2, 3, 3, 4, 6][self.below(12)]
    }

    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes([self.u8(), self.u8()])
    }

    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes([self.u8(), self.u8(), self.u8(), self.u8()])
    }

    pub fn below(&mut self, bound: usize) -> usize {
        usize::from(self.u16()) % bound
    }
}

/// Numbers at which something may end.
const EDGES: [u32; 12] = [0, 1, 2, 255, 256, 447, 448, 512, 0x7fff_ffff, 0x8000_0000, u32::MAX - 1, u32::MAX];

/// Changes something in a page.
pub fn edit(input: &mut Input<'_>, page: &mut [u8]) {
    let len = page.len();
    let at = input.below(len);
    let (word, long) = (at.min(len - 4) & !3, at.min(len - 8) & !7);
    match input.u8() % 6 {
        0 => page[at] ^= 1 << (input.u8() % 8),
        1 => page[at] = input.u8(),
        2 => page[word..word + 4].copy_from_slice(&EDGES[input.below(EDGES.len())].to_le_bytes()),
        3 => page[word..word + 4].copy_from_slice(&input.u32().to_le_bytes()),
        4 => {
            let old = u32::from_le_bytes(page[word..word + 4].try_into().expect("four bytes"));
            let new = old.wrapping_add_signed(i32::from(input.u8().cast_signed()));
            page[word..word + 4].copy_from_slice(&new.to_le_bytes());
        }
        _ => {
            let from = input.below(len - 7);
            page.copy_within(from..from + 8, long);
        }
    }
}

/// As many edits as the next byte says.
#[allow(dead_code, reason = "not every target has a use for it")]
pub fn edit_some(input: &mut Input<'_>, page: &mut [u8]) {
    for _ in 0..input.edits() {
        edit(input, page);
    }
}

/// Makes the CRC right of what has its own, in bytes 12 to 15.
#[allow(dead_code, reason = "not every target has a use for it")]
pub fn seal(bytes: &mut [u8]) {
    if bytes.len() >= 16 {
        bytes[12..16].fill(0);
        let crc = crc32c::crc32c(bytes);
        bytes[12..16].copy_from_slice(&crc.to_le_bytes());
    }
}
