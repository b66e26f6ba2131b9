//! What the tests are made of: a target, a daemon that serves its device to a VM, the VM.

#![forbid(unsafe_code)]

use crate::accel::Accel;
use crate::daemon::Daemon;
use crate::lab::{HOST_ID, HOST_NQN, Lab, NQN};
use crate::qemu::{Firmware, Qemu};
use crate::scratch::Scratch;
use crate::{Result, process};
use std::fs;
use std::path::{Path, PathBuf};

/// The name of the served disk, of its device in the configuration and, with `.sock`, of its socket.
pub(crate) const DISK: &str = "disk0";

/// Shell functions for scripts in guests.
pub(crate) const LIBRARY: &str = include_str!("../../guest/lib.sh");

/// UUID of the kernel target's namespace.
const UUID: &str = "0d1b5f6c-2a1e-4f1d-8a53-6b0c9e7f4d21";

/// A size as the configuration wants it.
pub(crate) fn mib(bytes: u64) -> String {
    format!("{}MiB", bytes / (1 << 20))
}

/// `[host]` section of the tests' daemons.
pub(crate) fn host_section() -> String {
    format!("[host]\nnqn = \"{HOST_NQN}\"\nid = \"{HOST_ID}\"\n\n")
}

/// Sections that offer a device (its `uri`) as namespace 1.
pub(crate) fn target_sections(uri: &str, listen: &str) -> String {
    format!(
        "[[device]]\nname = \"n0\"\nuri = \"{uri}\"\n\n\
        [[subsystem]]\nnqn = \"{NQN}\"\nlisten = [\"tcp://{listen}\"]\n\n\
        [[subsystem.namespace]]\nnsid = 1\ndevice = \"n0\"\n"
    )
}

/// Sections that serve a device as a disk; the socket's name is what `qemu-configs/` say.
pub(crate) fn disk_sections(
    folder: &Path,
    disk: &str,
    uri: &str,
    block_size: Option<u32>,
    queues: u32,
) -> String {
    multipath_sections(folder, disk, &[uri], block_size, queues)
}

/// Sections that serve a device with a path for each URI.
pub(crate) fn multipath_sections(
    folder: &Path,
    disk: &str,
    uris: &[&str],
    block_size: Option<u32>,
    queues: u32,
) -> String {
    let uris = match uris {
        [uri] => format!("\"{uri}\""),
        uris => format!("{uris:?}"),
    };
    let block_size = block_size.map(|bytes| format!("block_size = {bytes}\n")).unwrap_or_default();
    format!(
        "[[device]]\nname = \"{disk}\"\nuri = {uris}\n{block_size}\n\
        [[disk]]\nname = \"{disk}\"\ndevice = \"{disk}\"\nsocket = \"{}/{disk}.sock\"\nserial = \"{disk}\"\nqueues = {queues}\n\n",
        folder.display()
    )
}

/// The URI of a target's namespace 1.
pub(crate) fn uri_of(address: &str) -> String {
    format!("nvme+tcp://{address}/{NQN}?nsid=1")
}

/// The guest image served to a VM, from one of our targets on loopback or from a file.
///
/// Field order is drop order: the VM's side ends before the target's.
pub struct Served {
    /// The daemon that the VM is connected to.
    pub serve: Daemon,
    /// The daemon with the disk, if it is remote.
    pub target: Option<Daemon>,
    scratch: Scratch,
}

impl Served {
    /// Starts the target on a `mem:` device, imports the image over NVMe/TCP, starts serving it with `queues` queues.
    /// `shown`: with the import's progress bar.
    pub fn start(lab: &Lab, queues: u32, shown: bool) -> Result<Served> {
        Served::start_with(lab, "", "", queues, shown)
    }

    /// The same, with lines for the `[daemon]` section of the VM's daemon, and for its device.
    pub(crate) fn start_with(
        lab: &Lab,
        daemon: &str,
        device: &str,
        queues: u32,
        shown: bool,
    ) -> Result<Served> {
        let scratch = Scratch::new()?;
        let uri = format!("mem:?size={}", mib(crate::image::DISK_BYTES));
        let target =
            Daemon::start("target", &lab.hawser, scratch.path(), &target_sections(&uri, "127.0.0.1:0"))?;
        let uri = uri_of(&target.listener(NQN)?);
        let disk = disk_sections(scratch.path(), DISK, &uri, None, queues);
        let disk = disk.replacen("\n\n", &format!("\n{device}\n"), 1);
        let sections = daemon.to_owned() + &host_section() + &disk;
        import(lab, &scratch, &uri, shown)?;
        let mut serve = Daemon::start("serve", &lab.hawser, scratch.path(), &sections)?;
        serve.await_disk(DISK, "listening")?;
        Ok(Served { serve, target: Some(target), scratch })
    }

    /// Starts serving a copy of the image as a `file:` device.
    pub(crate) fn local(lab: &Lab, queues: u32) -> Result<Served> {
        let scratch = Scratch::new()?;
        let disk = scratch.file("disk.raw");
        fs::copy(&lab.image.disk, &disk).map_err(|e| format!("{}: {e}", disk.display()))?;
        let sections =
            disk_sections(scratch.path(), DISK, &format!("file://{}", disk.display()), None, queues);
        let mut serve = Daemon::start("serve", &lab.hawser, scratch.path(), &sections)?;
        serve.await_disk(DISK, "listening")?;
        Ok(Served { serve, target: None, scratch })
    }

    /// SIGTERM to the daemons, the VM's first; both must exit with 0.
    pub fn stop(mut self) -> Result<()> {
        self.serve.terminate()?;
        self.target.as_mut().map_or(Ok(()), Daemon::terminate)
    }

    /// The folder with all sockets.
    pub fn scratch(&self) -> &Scratch {
        &self.scratch
    }
}

/// Imports the guest image into the device at `uri`, and verifies it.
pub(crate) fn import(lab: &Lab, scratch: &Scratch, uri: &str, shown: bool) -> Result<()> {
    let config = scratch.file("import.toml");
    let folder = scratch.path().display();
    let text = format!(
        "[daemon]\napi = \"{folder}/import.api\"\nstate_dir = \"{folder}/import.var\"\n{}[[device]]\nname = \"{DISK}\"\nuri = \"{uri}\"\n",
        host_section()
    );
    fs::write(&config, text).map_err(|e| format!("{}: {e}", config.display()))?;
    Daemon::import(&lab.hawser, &config, &lab.image.disk, DISK, shown)
}

/// Copies OVMF's variable store to where `qemu-configs/uefi.cfg` wants it.
fn uefi_variables(folder: &Path) -> Result<()> {
    let from = Path::new("/usr/share/OVMF/OVMF_VARS_4M.fd");
    fs::copy(from, folder.join("OVMF_VARS.fd")).map(drop).map_err(|e| format!("{}: {e}", from.display()))
}

/// Boots the VM of a configuration file and waits for its shell; fails if the other firmware did it.
pub fn boot(lab: &Lab, config: &str, firmware: Firmware, folder: &Path, more: &[&str]) -> Result<Qemu> {
    if firmware == Firmware::Ovmf {
        uefi_variables(folder)?;
    }
    let with_back_end = |e: String| format!("{e}{}", process::tail(&folder.join("serve.log"), 25));
    let mut guest =
        Qemu::from_config("vm", &lab.config(config), folder, lab.accel, more).map_err(with_back_end)?;
    guest.ready().map_err(with_back_end)?;
    let uefi = guest.run("test -d /sys/firmware/efi && echo yes || echo no")? == "yes";
    if uefi != (firmware == Firmware::Ovmf) {
        return Err(guest.explain(&format!("it was to boot through {firmware} and did not")));
    }
    Ok(guest)
}

/// The part of the scratch partition that fio writes: small where it is slow.
pub fn verify_options(accel: Accel, seconds: u32) -> String {
    let size = if accel == Accel::Kvm { 96 } else { 24 };
    format!(
        "--filename=/dev/vda3 --ioengine=io_uring --iodepth=16 --rw=randwrite --bs=4k --size={size}M \
        --verify=crc32c --verify_backlog=512 --verify_fatal=1 --serialize_overlap=1 \
        --time_based --runtime={seconds}"
    )
}

/// Fails unless the guest's kernel saw no I/O error and its root file system is sound.
pub(crate) fn expect_no_trace(guest: &mut Qemu) -> Result<()> {
    match guest.io_errors()? {
        0 => Ok(()),
        count => {
            let log = guest.run("dmesg | tail -n 30")?;
            Err(guest.explain(&format!("{count} I/O errors in the guest's kernel log:\n{log}")))
        }
    }
}

/// The kernel's NVMe target in a guest of its own, with two ports and a disk of QEMU's; it survives a restart of the guest.
pub(crate) struct KernelTarget {
    guest: Option<Qemu>,
    disk: PathBuf,
    ports: [u16; 2],
}

impl KernelTarget {
    /// An empty disk of `bytes` behind nvmet on two free ports of the host's loopback.
    pub(crate) fn start(lab: &Lab, scratch: &Scratch, bytes: u64) -> Result<KernelTarget> {
        let disk = scratch.file("nvmet.raw");
        let file = fs::File::create(&disk).map_err(|e| format!("{}: {e}", disk.display()))?;
        file.set_len(bytes).map_err(|e| format!("{}: {e}", disk.display()))?;
        let mut target = KernelTarget { guest: None, disk, ports: [0; 2] };
        target.launch(lab, scratch)?;
        Ok(target)
    }

    /// Starts the target guest, at the ports that it had.
    pub(crate) fn launch(&mut self, lab: &Lab, scratch: &Scratch) -> Result<()> {
        let [first, second] = self.ports;
        let forwards = [format!("tcp:127.0.0.1:{first}-:4420"), format!("tcp:127.0.0.1:{second}-:4421")];
        let forwards = [forwards[0].as_str(), forwards[1].as_str()];
        let drive =
            format!("file={},format=raw,if=none,id=data,discard=unmap,file.locking=off", self.disk.display());
        let device = "virtio-blk-pci,drive=data,serial=data";
        let more = ["-drive", &drive, "-device", device];
        let mut guest = Qemu::from_kernel("nvmet", &lab.image, scratch.path(), lab.accel, &forwards, &more)?;
        guest.run(&format!(
            "set -e
            for module in null_blk nvmet nvmet-tcp; do modprobe $module; done
            for disk in /sys/block/vd*; do [ \"$(cat $disk/serial)\" = data ] && data=/dev/${{disk##*/}}; done
            cd /sys/kernel/config/nvmet
            mkdir subsystems/{NQN}
            echo 1 > subsystems/{NQN}/attr_allow_any_host
            mkdir subsystems/{NQN}/namespaces/1
            echo -n $data > subsystems/{NQN}/namespaces/1/device_path
            # The same after a restart: nvmet makes a new one otherwise, and another UUID is another disk.
            echo {UUID} > subsystems/{NQN}/namespaces/1/device_uuid
            echo 1 > subsystems/{NQN}/namespaces/1/enable
            for port in 1 2; do
                mkdir ports/$port
                echo tcp > ports/$port/addr_trtype
                echo ipv4 > ports/$port/addr_adrfam
                echo 10.0.2.15 > ports/$port/addr_traddr
                echo $((4419 + port)) > ports/$port/addr_trsvcid
                ln -s /sys/kernel/config/nvmet/subsystems/{NQN} ports/$port/subsystems/
            done"
        ))?;
        self.ports = [guest.forwarded_port(4420)?, guest.forwarded_port(4421)?];
        self.guest = Some(guest);
        Ok(())
    }

    /// Pulls the target guest's plug.
    pub(crate) fn end(&mut self) -> Result<()> {
        self.guest.take().map_or(Ok(()), Qemu::quit)
    }

    /// Pulls the target guest's plug and starts it again at the same ports.
    pub(crate) fn restart(&mut self, lab: &Lab, scratch: &Scratch) -> Result<()> {
        self.end()?;
        self.launch(lab, scratch)
    }

    /// Runs a script in nvmet's folder of configfs.
    pub(crate) fn run(&mut self, script: &str) -> Result<String> {
        self.guest()?.run(&format!("set -e; cd /sys/kernel/config/nvmet\n{script}"))
    }

    /// The guest that it is in.
    pub(crate) fn guest(&mut self) -> Result<&mut Qemu> {
        self.guest.as_mut().ok_or_else(|| "the kernel's target is not running".to_owned())
    }

    /// The first port's number on the host's loopback.
    pub(crate) fn port(&self) -> u16 {
        self.ports[0]
    }

    /// The namespace's URI at its first port.
    pub(crate) fn uri(&self) -> String {
        uri_of(&format!("127.0.0.1:{}", self.ports[0]))
    }

    /// The namespace's URIs at both ports, with digests.
    pub(crate) fn uris_with_digests(&self) -> [String; 2] {
        self.ports.map(|port| uri_of(&format!("127.0.0.1:{port}")) + "&hdr_digest=1&data_digest=1")
    }
}

/// Connects the kernel's NVMe/TCP initiator in `guest` to a port of the host's loopback; the disk is `/dev/nvme0n1`.
pub(crate) fn connect_from_guest(guest: &mut Qemu, port: u16) -> Result<()> {
    // 10.0.2.2 is the host's loopback, seen from a guest with user networking.
    guest
        .run_for(
            &format!(
                "set -e; modprobe nvme-tcp
                echo transport=tcp,traddr=10.0.2.2,trsvcid={port},nqn={NQN},hostnqn={HOST_NQN},hostid={HOST_ID},keep_alive_tmo=5,reconnect_delay=1 > /dev/nvme-fabrics
                until [ -b /dev/nvme0n1 ]; do usleep 50000; done"
            ),
            30,
        )
        .map(drop)
}

/// What a boot test reports.
pub(crate) fn boot_note(seconds: f64, iops: f64) -> String {
    format!("shell after {seconds:.1} s, {iops:.0} verified writes/s")
}

/// `program` on PATH?
pub(crate) fn installed(program: &str) -> bool {
    process::output(std::process::Command::new("sh").args(["-c", &format!("command -v {program}")])).is_ok()
}
