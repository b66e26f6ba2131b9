//! Little-endian fields in byte arrays: the one place where offsets meet integers. Callers pass arrays that are long
//! enough for the field by their type or by a check of their own.

pub(crate) fn get_u16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

pub(crate) fn get_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

pub(crate) fn get_u64(bytes: &[u8], at: usize) -> u64 {
    u64::from(get_u32(bytes, at)) | u64::from(get_u32(bytes, at + 4)) << 32
}

pub(crate) fn get_array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[at..at + N]);
    array
}

pub(crate) fn put_u16(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

pub(crate) fn put_u32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

pub(crate) fn put_u64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

/// The low 8 bits.
pub(crate) const fn low8(value: u32) -> u8 {
    value.to_le_bytes()[0]
}

/// The low 16 bits.
pub(crate) const fn low16(value: u32) -> u16 {
    let bytes = value.to_le_bytes();
    u16::from_le_bytes([bytes[0], bytes[1]])
}

/// The low 32 bits.
pub(crate) const fn low32(value: u64) -> u32 {
    let b = value.to_le_bytes();
    u32::from_le_bytes([b[0], b[1], b[2], b[3]])
}

/// Bits `low..=high` of `value`.
pub(crate) const fn bits(value: u64, high: u32, low: u32) -> u32 {
    low32((value >> low) & ((1 << (high - low + 1)) - 1))
}

/// A fixed field of ASCII, padded with spaces (NVMe base 2.0, 1.4.2: ASCII strings); what is too long is cut.
pub(crate) fn put_padded(bytes: &mut [u8], text: &str) {
    bytes.fill(b' ');
    for (to, from) in bytes.iter_mut().zip(text.bytes().filter(|b| (0x20..0x7f).contains(b))) {
        *to = from;
    }
}

/// The printable part of a fixed field of ASCII, without its padding (spaces, and the NULs that some devices use).
pub(crate) fn get_padded(bytes: &[u8]) -> String {
    let text: String = bytes
        .iter()
        .take_while(|b| **b != 0)
        .map(|b| if (0x20..0x7f).contains(b) { char::from(*b) } else { '?' })
        .collect();
    text.trim().to_owned()
}
