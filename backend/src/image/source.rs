//! Images as a run of pieces, each data or known to be zero.
//!
//! A raw image is read as it is; holes in the file are zero. Anything else goes through `qemu-img convert` into a sparse
//! file without a name, which cannot be left behind.

use crate::sys;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;
use std::process::{Command, Stdio};

/// An image that is open for reading.
pub struct Image {
    file: File,
    size_bytes: u64,
}

/// A part of an image.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Piece {
    Data { offset: u64, len: u64 },
    Zero { offset: u64, len: u64 },
}

impl Piece {
    pub(super) fn len(&self) -> u64 {
        let (Piece::Data { len, .. } | Piece::Zero { len, .. }) = self;
        *len
    }
}

impl Image {
    /// Opens `path`: qcow2 by its magic, raw otherwise.
    ///
    /// # Errors
    /// One line without the path.
    pub fn open(path: &Path) -> Result<Image, String> {
        let file = File::open(path).map_err(|error| format!("cannot be opened: {error}"))?;
        let metadata = file.metadata().map_err(|error| format!("cannot be examined: {error}"))?;
        if !metadata.is_file() && !metadata.file_type().is_block_device() {
            return Err("is neither a file nor a block device, want a raw or qcow2 image".to_owned());
        }
        let mut magic = [0; 4];
        let is_qcow2 = file.read_exact_at(&mut magic, 0).is_ok() && magic == *b"QFI\xfb";
        let file = if is_qcow2 { unpacked(path)? } else { file };
        let mut end = &file;
        let size_bytes =
            end.seek(SeekFrom::End(0)).map_err(|error| format!("its size cannot be read: {error}"))?;
        if size_bytes == 0 {
            return Err("is empty, want a raw or qcow2 image".to_owned());
        }
        Ok(Image { file, size_bytes })
    }

    /// The size of the disk that it is an image of.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The piece at `offset`: data up to the next multiple of `data_max`, or zeroes, at most `zero_max` of them.
    pub(super) fn piece(&self, offset: u64, data_max: u64, zero_max: u64) -> Result<Piece, String> {
        let step_end = ((offset / data_max + 1) * data_max).min(self.size_bytes);
        let data = sys::next_data(&self.file, offset).map_err(|error| format!("cannot be read: {error}"))?;
        if data.is_some_and(|data| data < step_end) {
            return Ok(Piece::Data { offset, len: step_end - offset });
        }
        let zero_end = data.map_or(self.size_bytes, |data| (data / data_max * data_max).min(self.size_bytes));
        Ok(Piece::Zero { offset, len: (zero_end - offset).min(zero_max) })
    }

    /// Fills `to` with the bytes from `offset` on, and with zeroes past the end.
    pub(super) fn read_at(&self, offset: u64, to: &mut [u8]) -> Result<(), String> {
        let mut filled = 0;
        while filled < to.len() {
            match self.file.read_at(&mut to[filled..], offset + filled as u64) {
                Ok(0) => {
                    to[filled..].fill(0);
                    break;
                }
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(format!("the image cannot be read at {offset}: {error}")),
            }
        }
        Ok(())
    }
}

/// The content of a qcow2 image in a sparse file that has no name.
fn unpacked(path: &Path) -> Result<File, String> {
    #[derive(serde::Deserialize)]
    struct Info {
        #[serde(rename = "virtual-size")]
        virtual_size: u64,
    }
    let info = qemu_img(&[
        OsStr::new("info"),
        OsStr::new("--output=json"),
        OsStr::new("-f"),
        OsStr::new("qcow2"),
        path.as_os_str(),
    ])?;
    // An image that was cut short converts without a word, and what is missing reads as zero.
    qemu_img(&[
        OsStr::new("check"),
        OsStr::new("-q"),
        OsStr::new("-f"),
        OsStr::new("qcow2"),
        path.as_os_str(),
    ])
    .map_err(|what| format!("is damaged: {what}"))?;
    let Info { virtual_size } =
        serde_json::from_slice(&info).map_err(|error| format!("qemu-img info is not understood: {error}"))?;
    // Beside the image there is room for images; where that may not be written, the temporary folder has to do.
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let file = match std::env::var_os("TMPDIR") {
        None => tempfile::tempfile_in(folder).or_else(|_| tempfile::tempfile()),
        Some(_) => tempfile::tempfile(),
    };
    let file = file.map_err(|error| format!("no temporary file to unpack it to: {error}"))?;
    file.set_len(virtual_size)
        .map_err(|error| format!("no temporary file of {virtual_size} bytes: {error}"))?;
    let nameless = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    let convert = ["convert", "-f", "qcow2", "-O", "raw", "-n", "--target-is-zero"].map(OsStr::new);
    let mut arguments = convert.to_vec();
    arguments.extend([path.as_os_str(), OsStr::new(&nameless)]);
    qemu_img(&arguments)?;
    Ok(file)
}

/// What qemu-img prints.
fn qemu_img(arguments: &[&OsStr]) -> Result<Vec<u8>, String> {
    let output = Command::new("qemu-img").args(arguments).stdin(Stdio::null()).output().map_err(|error| {
        if error.kind() == io::ErrorKind::NotFound {
            return "is a qcow2 image, which needs qemu-img (Debian: qemu-utils), and there is none"
                .to_owned();
        }
        format!("qemu-img cannot be run: {error}")
    })?;
    // 3 comes from `check` alone: clusters that nobody uses.
    if output.status.success() || output.status.code() == Some(3) {
        return Ok(output.stdout);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let first = said.lines().next().unwrap_or("failed without a word").trim();
    Err(format!("qemu-img: {}", first.strip_prefix("qemu-img: ").unwrap_or(first)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn image(size: u64, data: &[(u64, &[u8])]) -> Image {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        for (offset, bytes) in data {
            file.write_all_at(bytes, *offset).unwrap();
        }
        Image { file, size_bytes: size }
    }

    fn pieces(image: &Image, zero_max: u64) -> Vec<(char, u64, u64)> {
        let mut pieces = Vec::new();
        let mut at = 0;
        while at < image.size_bytes() {
            let piece = image.piece(at, MIB, zero_max).unwrap();
            let kind = if matches!(piece, Piece::Data { .. }) { 'd' } else { 'z' };
            pieces.push((kind, at, piece.len()));
            at += piece.len();
        }
        assert_eq!(at, image.size_bytes());
        pieces
    }

    #[test]
    fn holes_are_zero_and_data_is_whole_steps() {
        let image = image(10 * MIB + 700, &[(3 * MIB + 5, b"x"), (10 * MIB + 600, b"y")]);
        assert_eq!(
            pieces(&image, u64::MAX),
            [('z', 0, 3 * MIB), ('d', 3 * MIB, MIB), ('z', 4 * MIB, 6 * MIB), ('d', 10 * MIB, 700)]
        );
        assert_eq!(pieces(&image, 2 * MIB).len(), 7);
        assert_eq!(pieces(&image, MIB / 4)[0], ('z', 0, MIB / 4));
    }

    #[test]
    fn reading_past_the_end_gives_zeroes() {
        let image = image(5, &[(0, b"abcde")]);
        let mut bytes = [0xee; 8];
        image.read_at(2, &mut bytes).unwrap();
        assert_eq!(&bytes, b"cde\0\0\0\0\0");
    }
}
