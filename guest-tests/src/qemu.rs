//! QEMU as a child: firmware or kernel boot, its monitor, and the guest's shell.
//!
//! Owns: the command line around a file of `qemu-configs/`, or around a directly booted guest; start, reset, end.
//! Must not know: what is behind the guest's disks.
//! Invariants: QEMU runs in the lab's folder, so that the relative paths in the configuration files mean sockets there.

#![forbid(unsafe_code)]

mod migration;

pub use migration::{Cancelled, Moved};

use crate::accel::{Accel, QEMU};
use crate::image::Image;
use crate::json::Json;
use crate::process::{Deadline, Process, tail};
use crate::shell::{Ready, Shell};
use crate::{Result, progress};
use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// What a VM boots through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Firmware {
    /// PC BIOS.
    SeaBios,
    /// UEFI.
    Ovmf,
}

impl std::fmt::Display for Firmware {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Firmware::SeaBios => "SeaBIOS",
            Firmware::Ovmf => "OVMF",
        })
    }
}

/// One CPU: two under TCG are no faster on a small machine. But where there can never be a second one, TCG leaves out the guest's memory
/// barriers, and now and then the guest and who serves its disk, in another thread, miss each other's last word: the disk hangs.
pub(crate) const ONE_CPU: &str = "1,maxcpus=2";

/// One CPU, unless `more` says otherwise.
fn cpus(more: &[&str]) -> impl Iterator<Item = &'static str> {
    let arguments = if more.contains(&"-smp") { &[][..] } else { &["-smp", ONE_CPU] };
    arguments.iter().copied()
}

/// Said where a guest has died of what no guest does: Linux changes its own code under a breakpoint, which is gone when nobody meets it any more,
/// and TCG before QEMU 8.1 may translate the code while it is being changed (mended by "accel/tcg: Always lock pages before translation").
pub(crate) const EMULATORS_FAULT: &str = "the emulator ran code that was being changed";

/// A running guest.
pub struct Qemu {
    process: Process,
    name: String,
    console: PathBuf,
    monitor: Monitor,
    shell: Shell,
    accel: Accel,
    started: Instant,
    folder: PathBuf,
    /// The arguments that a QEMU which takes the guest over is started with; none for a guest that was started from its kernel.
    recipe: Vec<OsString>,
    /// QEMUs that were started to take the guest over.
    successors: u32,
}

impl Qemu {
    /// Starts a VM from a file of `qemu-configs/`, in `folder`; `more` is appended to the command line.
    pub fn from_config(
        name: &str,
        config: &Path,
        folder: &Path,
        accel: Accel,
        more: &[&str],
    ) -> Result<Qemu> {
        let mut recipe: Vec<OsString> = vec!["-readconfig".into(), config.into()];
        recipe.extend(cpus(more).map(OsString::from));
        recipe.extend(more.iter().map(OsString::from));
        let mut command = Command::new(QEMU);
        command.args(&recipe);
        let mut guest = Qemu::start(name, command, folder, accel)?;
        guest.recipe = recipe;
        Ok(guest)
    }

    /// Starts a guest from its kernel, with the tools image as its read-only root on a disk of QEMU's own and with user
    /// networking; `forwards` are `hostfwd` rules.
    pub fn from_kernel(
        name: &str,
        image: &Image,
        folder: &Path,
        accel: Accel,
        forwards: &[&str],
        more: &[&str],
    ) -> Result<Qemu> {
        let mut command = Command::new(QEMU);
        command
            .args(["-M", "q35", "-m", "384M"])
            .args(cpus(more))
            .arg("-kernel")
            .arg(&image.kernel)
            .arg("-initrd")
            .arg(&image.initrd);
        command.args(["-append", "root=LABEL=hawser-tools ro console=ttyS0,115200 loglevel=4"]);
        command
            .arg("-drive")
            .arg(format!("file={},format=raw,if=virtio,readonly=on,file.locking=off", image.tools.display()));
        let forwards: String = forwards.iter().map(|rule| format!(",hostfwd={rule}")).collect();
        command.arg("-netdev").arg(format!("user,id=net0,ipv6=off{forwards}"));
        command.args(["-device", "virtio-net-pci,netdev=net0,romfile="]).args(more);
        let mut guest = Qemu::start(name, command, folder, accel)?;
        guest.ready()?;
        guest.run(
            "modprobe virtio_net; modprobe configfs; ip link set eth0 up; ip addr add 10.0.2.15/24 dev eth0
            ip route add default via 10.0.2.2; mount -t configfs configfs /sys/kernel/config",
        )?;
        Ok(guest)
    }

    fn start(name: &str, mut command: Command, folder: &Path, accel: Accel) -> Result<Qemu> {
        let console = folder.join(format!("{name}.console"));
        let (monitor, shell) = (folder.join(format!("{name}.qmp")), folder.join(format!("{name}.sh")));
        for stale in [&monitor, &shell] {
            let _ = fs::remove_file(stale);
        }
        command.current_dir(folder).args(["-accel", accel.argument(), "-nodefaults", "-no-user-config"]);
        if accel != Accel::Kvm {
            // With random numbers from the first moment on the kernel does not change its code for them while it is at work: see `EMULATORS_FAULT`.
            command.args(["-cpu", "qemu64,+rdrand"]);
        }
        command.args(["-display", "none"]);
        // The disk image's clock-dependent parts do not matter; entropy does: a guest without it waits.
        command.args(["-device", "virtio-rng-pci"]);
        command.arg("-chardev").arg(format!("file,id=console,path={},append=on", console.display()));
        command.args(["-serial", "chardev:console"]);
        command.arg("-chardev").arg(format!("socket,id=shell,path={},server=on,wait=off", shell.display()));
        command.args(["-serial", "chardev:shell"]);
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", monitor.display()));
        let started = Instant::now();
        let mut process = Process::start(command, &folder.join(format!("{name}.log")))?;
        // QEMU does not open its monitor before its vhost-user disks have answered.
        let deadline = Deadline::new(30, format!("QEMU ({name}) to open its monitor"));
        let monitor = Monitor::connect(&monitor, &deadline, &mut process)?;
        let shell = Shell::connect(&shell, &deadline)?;
        Ok(Qemu {
            process,
            name: name.to_owned(),
            console,
            monitor,
            shell,
            accel,
            started,
            folder: folder.to_owned(),
            recipe: Vec::new(),
            successors: 0,
        })
    }

    /// Time since QEMU was started.
    pub fn age(&self) -> Duration {
        self.started.elapsed()
    }

    /// QEMU's process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Waits for the guest's shell, which its root file system answers.
    pub fn ready(&mut self) -> Result<Ready> {
        let seconds = 30 * self.accel.patience();
        let deadline = Deadline::new(seconds, format!("the shell of guest {}", self.name));
        let (process, console) = (&mut self.process, &self.console);
        let ready = self.shell.ready(&deadline, || {
            process.must_live()?;
            let text = fs::read(console).unwrap_or_default();
            match String::from_utf8_lossy(&text).contains("Kernel panic") {
                true => Err("the guest's kernel panicked".into()),
                false => Ok(()),
            }
        });
        ready.map_err(|e| self.explain(&e))
    }

    /// An error with what the guest last wrote to its console, and QEMU to its log.
    pub fn explain(&self, error: &str) -> String {
        let text = fs::read(&self.console).unwrap_or_default();
        let why = match String::from_utf8_lossy(&text).contains("int3: 0000 [#") {
            true => format!(" ({EMULATORS_FAULT})"),
            false => String::new(),
        };
        format!("guest {}: {error}{why}{}{}", self.name, tail(&self.console, 25), self.process.log_tail())
    }

    /// Runs a script in the guest that must succeed soon.
    pub fn run(&mut self, script: &str) -> Result<String> {
        self.run_for(script, 10)
    }

    /// Runs a script in the guest that must succeed within `seconds` (on KVM; longer where the guest is slower).
    pub fn run_for(&mut self, script: &str, seconds: u64) -> Result<String> {
        let result = self.shell.run(script, seconds * self.accel.patience());
        result.map_err(|e| self.explain(&e))
    }

    /// The shell itself, for scripts that run while something else happens.
    pub fn shell(&mut self) -> &mut Shell {
        &mut self.shell
    }

    /// Multiplier for deadlines of scripts that are started by hand.
    pub fn patience(&self) -> u64 {
        self.accel.patience()
    }

    /// Runs a monitor command without arguments, or with `arguments` as JSON text.
    pub fn monitor(&mut self, command: &str, arguments: &str) -> Result<Json> {
        self.monitor.execute(command, arguments, &mut self.process)
    }

    /// Presses the reset button and waits for the guest's shell.
    pub fn reset(&mut self) -> Result<Ready> {
        self.press_reset()?;
        self.ready()
    }

    /// Presses the reset button, and does not wait for what comes of it.
    pub fn press_reset(&mut self) -> Result<()> {
        self.monitor("system_reset", "{}").map(drop)
    }

    /// Lets the guest reboot itself and waits for its shell.
    pub fn reboot(&mut self) -> Result<Ready> {
        // The agent dies with the guest: there is no answer to wait for.
        let _ = self.shell.start("sync; reboot -f")?;
        self.ready()
    }

    /// The host's port that a `hostfwd` rule with port 0 got, for the guest's `port`.
    pub fn forwarded_port(&mut self, port: u16) -> Result<u16> {
        let answer = self.monitor("human-monitor-command", r#"{"command-line":"info usernet"}"#)?;
        let text = answer.text("return")?.to_owned();
        // TCP[HOST_FORWARD]  12       127.0.0.1 38223       10.0.2.15  4420     0     0
        let words = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let mut found = words.filter(|words| words.first() == Some(&"TCP[HOST_FORWARD]"));
        found
            .find_map(|words| match words[..] {
                [_, _, _, host, _, guest, ..] if guest == port.to_string() => host.parse().ok(),
                _ => None,
            })
            .ok_or_else(|| format!("QEMU forwards no port to the guest's {port}: {text}"))
    }

    /// Lines in the guest's kernel log that speak of failed I/O.
    pub fn io_errors(&mut self) -> Result<u64> {
        // Read-ahead (bit 19 of the flags) fails at once when its path is lost, and whoever needs the blocks reads them again.
        // The block layer says so in a line after nvme's own, which has no flags.
        let count = self.run(
            "dmesg | grep -iE 'I/O error|Buffer I/O|blk_update_request|EXT4-fs error|hung task' \
             | grep -vE 'I/O Cmd\\(0x|:\\(READ\\) flags 0x[0-9a-f]*[89a-f][0-9a-f]{4} ' | wc -l",
        )?;
        count.parse().map_err(|_| self.explain(&format!("grep -c answered {count:?}")))
    }

    /// Ends QEMU by its monitor, as a power cut does to the guest.
    pub fn quit(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        let _ = self.monitor("quit", "{}");
        self.process.wait(20).map(drop)
    }

    /// Flushes the guest's file systems, then ends QEMU.
    pub fn sync_and_quit(mut self) -> Result<()> {
        self.run_for("sync", 30)?;
        self.quit()
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        if std::env::var_os("HAWSER_GUEST_VERBOSE").is_some() {
            progress(&format!("guest {} ends{}", self.name, tail(&self.console, 40)));
        }
    }
}

struct Monitor {
    reader: BufReader<UnixStream>,
}

impl Monitor {
    fn connect(path: &Path, deadline: &Deadline, process: &mut Process) -> Result<Monitor> {
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(_) => {
                    process.must_live()?;
                    deadline.nap().map_err(|e| format!("{e}{}", process.log_tail()))?;
                }
            }
        };
        stream.set_read_timeout(Some(Duration::from_secs(20))).map_err(|e| format!("QEMU's monitor: {e}"))?;
        let mut monitor = Monitor { reader: BufReader::new(stream) };
        monitor.line()?;
        monitor.execute("qmp_capabilities", "{}", process)?;
        Ok(monitor)
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        match self.reader.read_line(&mut line) {
            Ok(0) => Err("QEMU's monitor: closed".into()),
            Ok(_) => Ok(line),
            Err(e) => Err(format!("QEMU's monitor: {e}")),
        }
    }

    fn execute(&mut self, command: &str, arguments: &str, process: &mut Process) -> Result<Json> {
        let request = format!("{{\"execute\":\"{command}\",\"arguments\":{arguments}}}\n");
        self.reader.get_mut().write_all(request.as_bytes()).map_err(|e| format!("QEMU's monitor: {e}"))?;
        loop {
            let line = self.line().map_err(|e| format!("{e}{}", process.log_tail()))?;
            let answer = Json::parse(&line)?;
            if let Some(error) = answer.get("error.desc") {
                return Err(format!("QEMU's monitor: {command}: {error:?}"));
            }
            if answer.get("return").is_some() {
                return Ok(answer);
            }
            // Anything else is an event.
        }
    }
}
