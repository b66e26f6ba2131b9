//! Which binary this is: the build ID that the linker put into the ELF file.
//!
//! A "newer binary" is one with another build ID, whatever its version says.

use std::fs;
use std::io;

const PT_NOTE: u32 = 4;
const NT_GNU_BUILD_ID: u32 = 3;

/// The running binary's build ID in hexadecimal; `unknown` when it was linked without one.
pub(super) fn own() -> String {
    read().ok().flatten().unwrap_or_else(|| "unknown".to_owned())
}

fn read() -> io::Result<Option<String>> {
    Ok(build_id(&fs::read("/proc/self/exe")?))
}

/// Looks through the notes of a 64-bit little-endian ELF file (gABI, "Program Header" and "Note Section").
fn build_id(elf: &[u8]) -> Option<String> {
    if elf.get(..6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let headers = usize::try_from(u64_at(elf, 32)?).ok()?;
    let entry = usize::from(u16_at(elf, 54)?);
    let count = usize::from(u16_at(elf, 56)?);
    (0..count).find_map(|index| {
        let header = elf.get(headers.checked_add(index * entry)?..)?;
        if u32_at(header, 0)? != PT_NOTE {
            return None;
        }
        let offset = usize::try_from(u64_at(header, 8)?).ok()?;
        let size = usize::try_from(u64_at(header, 32)?).ok()?;
        in_notes(elf.get(offset..offset.checked_add(size)?)?)
    })
}

fn in_notes(mut notes: &[u8]) -> Option<String> {
    loop {
        let name_size = u32_at(notes, 0)? as usize;
        let value_size = u32_at(notes, 4)? as usize;
        let kind = u32_at(notes, 8)?;
        let name = notes.get(12..12 + name_size)?;
        let value_at = 12 + name_size.next_multiple_of(4);
        let value = notes.get(value_at..value_at + value_size)?;
        if kind == NT_GNU_BUILD_ID && name == b"GNU\0" {
            return Some(value.iter().map(|byte| format!("{byte:02x}")).collect());
        }
        notes = notes.get(value_at + value_size.next_multiple_of(4)..)?;
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_binary_has_one() {
        let id = own();
        assert!(id.len() >= 16 && id.chars().all(|c| c.is_ascii_hexdigit()), "{id}");
    }

    #[test]
    fn cut_and_strange_files_have_none() {
        let elf = fs::read("/proc/self/exe").unwrap();
        for len in [0, 5, 32, 57, 64, 100, 300] {
            assert_eq!(build_id(&elf[..len]), None, "{len}");
        }
        let mut strange = elf[..4096].to_vec();
        strange[32..40].fill(0xff);
        assert_eq!(build_id(&strange), None);
    }
}
