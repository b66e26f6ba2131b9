//! Files on the memory file system and on a disk's, beside a byte-wise model; locks between processes; sizes.

use super::backing::Backing;
use super::*;
use crate::testing::{Harness, compare_with_model, refuses_what_is_wrong};
use hawser_block::{Operation, Status};
use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::AtomicUsize;

/// A folder that goes away with the test, on the file system of `base`.
struct Folder(PathBuf);

impl Folder {
    fn new(base: &Path) -> Folder {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = base.join(format!("hawser-file-{}-{number}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        Folder(path)
    }

    fn file(&self, content: &[u8]) -> PathBuf {
        let path = self.0.join("disk");
        std::fs::write(&path, content).unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // A test may have closed it.
        let _ = std::fs::set_permissions(&self.0, PermissionsExt::from_mode(0o755));
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Memory, and whatever the build's own folder lies on.
fn bases() -> Vec<PathBuf> {
    let built = std::env::current_exe().unwrap();
    vec![PathBuf::from("/dev/shm"), built.parent().unwrap().to_owned()]
}

const RW: FileOptions = FileOptions { block_size: BlockSize::B512, read_only: false };
const RO: FileOptions = FileOptions { block_size: BlockSize::B512, read_only: true };

/// With a wait: while another test starts a process, its copy of our descriptors holds locks until it has become another
/// program.
fn open(path: &Path, options: FileOptions) -> Result<FileDevice, String> {
    FileDevice::open("f", path, options)
}

fn open_at_once(path: &Path) -> Result<FileDevice, String> {
    FileDevice::open_waiting("f", path, RW, Duration::ZERO)
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|index| u8::try_from(index % 253).unwrap()).collect()
}

#[test]
fn random_requests_match_a_byte_wise_model_on_every_file_system() {
    for (at, base) in bases().iter().enumerate() {
        let folder = Folder::new(base);
        for (block_size, unit) in [(BlockSize::B512, 1), (BlockSize::B512, 512), (BlockSize::B4096, 4096)] {
            let content = pattern(400 * 4096);
            let path = folder.file(&content);
            let device = open(&path, FileOptions { block_size, read_only: false }).unwrap();
            let mut harness = Harness::new();
            let seed = 10 + at as u64;
            compare_with_model(&mut harness, &device, content, unit, 60, seed);
            assert_eq!(device.bounced_requests() > 0, device.is_direct() && unit == 1, "{}", base.display());
            refuses_what_is_wrong(&mut harness, &device);
        }
    }
}

/// A loop device over a file, detached at the end.
struct Loop(PathBuf);

impl Loop {
    fn attach(file: &Path) -> Result<Loop, String> {
        let output = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(file)
            .output()
            .map_err(|error| format!("losetup: {error}"))?;
        if output.status.success() {
            Ok(Loop(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim())))
        } else {
            Err(String::from_utf8_lossy(&output.stderr).into_owned())
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

#[test]
fn a_block_device_matches_the_model_and_discards() {
    // Over a disk's file system: over tmpfs, the loop device fails at zeroes that keep their space, and the kernel then
    // takes its holes away too.
    let folder = Folder::new(&bases()[1]);
    let content = pattern(400 * 4096);
    let path = folder.file(&content);
    let looped = match Loop::attach(&path) {
        Ok(looped) => looped,
        Err(reason) => return skips::skip(format_args!("no loop device: {reason}")),
    };
    let device = open(&looped.0, RW).unwrap();
    let geometry = device.geometry().unwrap();
    assert_eq!(geometry.blocks, 3200);
    assert!(device.is_direct());
    let mut harness = Harness::new();
    compare_with_model(&mut harness, &device, content, 1, 60, 21);
    assert!(device.bounced_requests() > 0);
    refuses_what_is_wrong(&mut harness, &device);
    if geometry.discard.is_some() {
        let space = || std::fs::metadata(&path).unwrap().blocks() * 512;
        let mut channel = harness.open(&device);
        let all = (0, 3200);
        let keep = Operation::WriteZeroes { unmap: false, fua: true };
        assert_eq!(harness.one(channel.as_mut(), keep, all, &mut [], 0), Ok(()));
        assert_eq!(harness.one(channel.as_mut(), Operation::Discard, all, &mut [], 0), Ok(()));
        assert_eq!(space(), 0);
    }
}

#[test]
fn payload_at_any_address_reads_back() {
    for base in bases() {
        let folder = Folder::new(&base);
        let device = open(&folder.file(&pattern(1 << 20)), RW).unwrap();
        let mut harness = Harness::new();
        let mut channel = harness.open(&device);
        for skew in [0, 1, 2, 4, 8, 16, 511, 512] {
            let mut payload = pattern(8 * 512 + skew)[skew..].to_vec();
            let write = Operation::Write { fua: skew % 2 == 0 };
            assert_eq!(harness.one(channel.as_mut(), write, (8, 8), &mut payload, skew), Ok(()));
            let mut back = vec![0; 8 * 512];
            assert_eq!(harness.one(channel.as_mut(), Operation::Read, (8, 8), &mut back, 512 - skew), Ok(()));
            assert!(back == payload, "{} skew {skew}", base.display());
        }
        assert_eq!(device.bounced_requests() > 0, device.is_direct());
    }
}

/// What the file system can do was tried on a nameless file in the image's folder, which a daemon in its sandbox, or without
/// rights to the folder, may not make: zeroes that keep their space were punched and allocated again.
#[test]
fn what_a_file_can_do_is_found_out_without_rights_to_its_folder() {
    for base in bases() {
        let folder = Folder::new(&base);
        let path = folder.file(&pattern(1 << 20));
        let with = Backing::open(&path, RW, LOCK_WAIT).unwrap().0;
        let found = (with.can_zero, with.can_punch);
        drop(with);
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o666)).unwrap();
        std::fs::set_permissions(&folder.0, PermissionsExt::from_mode(0o555)).unwrap();
        let without = std::thread::scope(|scope| {
            let other_user = scope.spawn(|| {
                // SAFETY: plain system call; it is this thread's file system user alone that changes, and the thread ends.
                unsafe { libc::syscall(libc::SYS_setfsuid, 65534) };
                let nameless = OpenOptions::new().write(true).custom_flags(libc::O_TMPFILE).open(&folder.0);
                assert!(nameless.is_err(), "the folder is closed");
                Backing::open(&path, RW, LOCK_WAIT).unwrap().0
            });
            other_user.join().unwrap()
        });
        assert_eq!((without.can_zero, without.can_punch), found, "{}", base.display());
        assert_eq!(without.size().unwrap(), 1 << 20);
        drop(without);
        assert!(std::fs::read(&path).unwrap() == pattern(1 << 20), "nothing of it has changed");
        // A block past the end, where the file system keeps it.
        assert!(std::fs::metadata(&path).unwrap().blocks() * 512 <= (1 << 20) + (16 << 10));
    }
}

#[test]
fn discard_gives_space_back_and_zeroes_without_unmap_keep_it() {
    for base in bases() {
        let folder = Folder::new(&base);
        let path = folder.file(&vec![0xee; 1 << 20]);
        let device = open(&path, RW).unwrap();
        let geometry = device.geometry().unwrap();
        if geometry.discard.is_none() {
            skips::skip(format_args!("{} cannot punch holes", base.display()));
            continue;
        }
        let space = || std::fs::metadata(&path).unwrap().blocks() * 512;
        let mut harness = Harness::new();
        let mut channel = harness.open(&device);
        let keep = Operation::WriteZeroes { unmap: false, fua: true };
        assert_eq!(harness.one(channel.as_mut(), keep, (0, 1024), &mut [], 0), Ok(()));
        assert!(space() >= 1 << 20, "{}: zeroes kept their space", base.display());
        assert_eq!(harness.one(channel.as_mut(), Operation::Discard, (0, 512), &mut [], 0), Ok(()));
        assert!(space() <= (1 << 20) - (200 << 10), "{}: discarded space came back", base.display());
        let give = Operation::WriteZeroes { unmap: true, fua: false };
        assert_eq!(harness.one(channel.as_mut(), give, (512, 512), &mut [], 0), Ok(()));
        assert!(space() <= (1 << 20) - (400 << 10), "{}: unmapped space came back", base.display());
        let mut content = vec![1; 1 << 20];
        assert_eq!(harness.one(channel.as_mut(), Operation::Read, (0, 2048), &mut content, 0), Ok(()));
        assert!(content[..1 << 19].iter().all(|byte| *byte == 0));
        assert!(content[1 << 19..].iter().all(|byte| *byte == 0xee));
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 1 << 20);
    }
}

#[test]
fn opening_changes_nothing_and_says_what_is_wrong() {
    for base in bases() {
        let folder = Folder::new(&base);
        let content = pattern(8192);
        let path = folder.file(&content);
        let modified = std::fs::metadata(&path).unwrap().modified().unwrap();
        drop(open(&path, RW).unwrap());
        assert_eq!(std::fs::read(&path).unwrap(), content);
        assert_eq!(std::fs::metadata(&path).unwrap().modified().unwrap(), modified);
        assert_eq!(std::fs::read_dir(&folder.0).unwrap().count(), 1);

        let shown = path.display().to_string();
        let odd = folder.file(&content[..1000]);
        let error = open(&odd, RW).err().unwrap();
        let wanted = "size 1000 is not a multiple of the block size 512; 512 or 1024 would be";
        assert_eq!(error, format!("{shown}: {wanted}"));
        let error = open(&folder.0.join("no"), RW).err().unwrap();
        assert!(error.contains("/no: cannot be opened: No such file"), "{error}");
        let error = open(&folder.0, RO).err().unwrap();
        assert!(error.contains("neither a regular file nor a block device"), "{error}");
        let error = open(Path::new("/dev/null"), RW).err().unwrap();
        assert!(error.contains("neither a regular file nor a block device"), "{error}");
    }
}

#[test]
fn a_read_only_device_refuses_writes_and_leaves_the_lock_to_others() {
    let folder = Folder::new(Path::new("/dev/shm"));
    let path = folder.file(&pattern(8192));
    let writer = open(&path, RW).unwrap();
    let reader = open(&path, RO).unwrap();
    assert!(reader.geometry().unwrap().read_only);
    let mut harness = Harness::new();
    let mut channel = harness.open(&reader);
    let mut block = vec![0; 512];
    assert_eq!(harness.one(channel.as_mut(), Operation::Read, (1, 1), &mut block, 0), Ok(()));
    assert_eq!(block, pattern(1024)[512..]);
    for operation in [Operation::Write { fua: false }, Operation::Discard] {
        let len = if operation.has_payload() { 512 } else { 0 };
        let outcome = harness.one(channel.as_mut(), operation, (1, 1), &mut block[..len], 0);
        assert_eq!(outcome, Err(Status::ReadOnly));
    }
    let error = open_at_once(&path).err().unwrap();
    assert!(error.ends_with("another process writes to it, and did not end within 0 s"), "{error}");
    drop(writer);
    open(&path, RW).expect("the lock went with its device");
}

#[test]
fn growth_is_followed_and_shrinkage_fails_the_device() {
    for base in bases() {
        let folder = Folder::new(&base);
        let path = folder.file(&pattern(8192));
        let device = open(&path, RW).unwrap();
        let (told, tells) = mpsc::channel();
        device.subscribe(Box::new(move || {
            let _ = told.send(());
        }));
        let mut harness = Harness::new();
        let mut channel = harness.open(&device);
        let mut block = vec![9; 512];
        let write = Operation::Write { fua: false };
        assert_eq!(harness.one(channel.as_mut(), write, (20, 1), &mut block, 0), Err(Status::Invalid));

        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(16384).unwrap();
        device.refresh();
        tells.recv().unwrap();
        assert_eq!(device.geometry().unwrap().blocks, 32);
        assert_eq!(harness.one(channel.as_mut(), write, (20, 1), &mut block, 0), Ok(()));

        file.set_len(4096).unwrap();
        // Before anybody looked: the end of the file comes before the end of the request.
        let mut blocks = vec![1; 16 * 512];
        let across = harness.one(channel.as_mut(), Operation::Read, (0, 16), &mut blocks, 0);
        assert_eq!(across, Err(Status::Media));
        device.refresh();
        assert_eq!(device.state(), DeviceState::Failed);
        assert!(device.trouble().contains("shrank from 16384 to 4096 bytes"), "{}", device.trouble());
        assert_eq!(harness.one(channel.as_mut(), Operation::Read, (0, 1), &mut block, 0), Err(Status::Media));
        file.set_len(16384).unwrap();
        device.refresh();
        assert_eq!(device.state(), DeviceState::Failed, "until it is opened again");
        drop((channel, device));
        assert_eq!(open(&path, RW).unwrap().state(), DeviceState::Ready);
    }
}

#[test]
fn aborting_ends_every_request_once() {
    for base in bases() {
        let folder = Folder::new(&base);
        let path = folder.file(&pattern(1 << 20));
        let device = open(&path, RW).unwrap();
        let mut harness = Harness::new();
        let mut channel = harness.open(&device);
        let mut numbers = crate::testing::Numbers::new(5);
        let payload: Vec<_> =
            (0..8).map(|_| crate::testing::Pieces::new(&mut numbers, 128 << 10, 3, 512)).collect();
        let mut batch: Vec<_> = payload
            .iter()
            .enumerate()
            .map(|(index, pieces)| hawser_block::Request {
                operation: Operation::Read,
                lba: hawser_block::Lba(index as u64 * 256),
                blocks: hawser_block::BlockCount(256),
                buffers: pieces.buffers(),
                token: hawser_block::Token(index as u64),
            })
            .collect();
        channel.submit(&mut batch);
        channel.abort();
        let mut ended = Vec::new();
        while ended.len() < 8 {
            channel.reap(&mut ended);
            if ended.len() < 8 {
                harness.reactor.step();
            }
        }
        ended.sort_by_key(|completion| completion.token);
        for (index, completion) in ended.iter().enumerate() {
            assert_eq!(completion.token.0, index as u64);
            assert!(matches!(completion.outcome, Ok(()) | Err(Status::Aborted)));
        }
        let mut block = vec![0; 512];
        assert_eq!(harness.one(channel.as_mut(), Operation::Read, (0, 1), &mut block, 0), Ok(()));
    }
}

/// A process of its own that writes to a file as fast as it can: this test program again, running `child_writer`.
struct Writer(Child);

impl Writer {
    fn start(path: &Path) -> Writer {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "file::tests::child_writer", "--nocapture", "--ignored"])
            .env("HAWSER_TEST_FILE", path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let writer = Writer(child);
        assert!(
            lines.by_ref().map_while(Result::ok).any(|line| line.contains("writing")),
            "the child did not start"
        );
        writer
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Not a test: what [`Writer`] runs. It ends by being killed, or with the thread that started it.
#[test]
#[ignore = "a child process of another test"]
fn child_writer() {
    let Some(path) = std::env::var_os("HAWSER_TEST_FILE") else { return };
    // SAFETY: plain system call without pointers.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) }, 0);
    let device = open(Path::new(&path), RW).unwrap();
    let mut harness = Harness::new();
    let mut channel = harness.open(&device);
    let mut numbers = crate::testing::Numbers::new(6);
    let payload: Vec<_> =
        (0..16).map(|_| crate::testing::Pieces::new(&mut numbers, 64 << 10, 0, 4096)).collect();
    for round in 0..u64::MAX {
        if round == 1 {
            println!("writing");
            std::io::stdout().flush().unwrap();
        }
        let requests = payload
            .iter()
            .enumerate()
            .map(|(index, pieces)| {
                pieces.fill(&vec![u8::try_from(round % 256).unwrap(); 64 << 10]);
                hawser_block::Request {
                    operation: Operation::Write { fua: false },
                    lba: hawser_block::Lba(index as u64 * 128),
                    blocks: hawser_block::BlockCount(128),
                    buffers: pieces.buffers(),
                    token: hawser_block::Token(index as u64),
                }
            })
            .collect();
        harness.run(channel.as_mut(), requests);
    }
}

#[test]
fn a_successor_waits_for_a_killed_writer_and_sees_no_write_of_it_afterwards() {
    for base in bases() {
        for _ in 0..5 {
            let folder = Folder::new(&base);
            let path = folder.file(&vec![0; 1 << 20]);
            let mut writer = Writer::start(&path);
            let refused = open_at_once(&path).err().unwrap();
            assert!(refused.contains("another process writes to it"), "{refused}");
            let killer = std::thread::spawn(move || {
                writer.0.kill().unwrap();
                writer
            });
            let device = FileDevice::open("f", &path, RW).unwrap();
            // From here on the file is ours: whatever it holds now, it keeps.
            let look = |into: &mut Vec<u8>| {
                into.resize(1 << 20, 0);
                std::fs::File::open(&path).unwrap().read_exact_at(into, 0).unwrap();
            };
            let (mut first, mut second) = (Vec::new(), Vec::new());
            look(&mut first);
            drop(killer.join().unwrap());
            std::thread::sleep(Duration::from_millis(20));
            look(&mut second);
            assert!(first == second, "{}: a dead process wrote", base.display());
            drop(device);
        }
    }
}
