//! Admin and I/O commands, as nvme-cli sends them: what is offered works, and everything else is refused as the table in
//! docs/nvme-of.md says.

#![forbid(unsafe_code)]

use super::{Bench, Check, MIB, SIZE};
use crate::Result;
use std::fs::OpenOptions;

pub(super) const CHECKS: &[Check] = &[
    ("identify_answers", identify),
    ("log_pages_answer", logs),
    ("features_are_read_and_set", features),
    ("what_is_not_offered_is_refused", unsupported),
    ("io_commands_do_what_they_say", io),
    ("fio_verifies_with_digests_and_several_queues", queues),
    ("a_namespace_that_grows_is_seen", grows),
];

fn identify(bench: &mut Bench) -> Result<String> {
    bench.run(
        "c=$(join $N 127.0.0.1 $N1 a); within 10 have_disk $N 1; within 10 have_disk $N 2
        out=$(nvme id-ctrl /dev/$c); has \"subnqn : $N\" \"$out\"; has 'mn : hawser' \"$out\"; has 'mdts : 8' \"$out\"
        has 'fuses : 0' \"$out\"; has 'vwc : 0x5' \"$out\"
        out=$(nvme id-ns /dev/$c -n 1); has 'nsze : 0x20000' \"$out\"; has 'lbads:9' \"$out\"; has 'rescap : 0xff' \"$out\"
        out=$(nvme id-ns /dev/$c -n 2); has 'nsze : 0x4000' \"$out\"; has 'lbads:12' \"$out\"
        out=$(nvme list-ns /dev/$c); has '0]:0x1' \"$out\"; has '1]:0x2' \"$out\"
        out=$(nvme ns-descs /dev/$c -n 1); has \"uuid : $(cat /sys/block/$(disk $N 1)/uuid)\" \"$out\"; has 'csi : 0' \"$out\"
        has 'nstat : 0x1' \"$(nvme cmdset-ind-id-ns /dev/$c -n 1)\"
        nvme nvm-id-ctrl /dev/$c > /dev/null
        refused 'Invalid Namespace' nvme id-ns /dev/$c -n 7
        invalid='Invalid Field in Command'
        for what in list-ctrl id-nvmset list-secondary primary-ctrl-caps id-uuid id-ns-granularity id-domain id-iocs; do
            refused \"$invalid\" nvme $what /dev/$c
        done
        refused \"$invalid\" nvme list-ns /dev/$c -a",
    )?;
    Ok("CNS 00h to 03h, 05h, 06h, 08h; 9 others refused".into())
}

fn logs(bench: &mut Bench) -> Result<String> {
    bench.run(
        "c=$(join $N 127.0.0.1 $N1 a)
        out=$(nvme supported-log-pages /dev/$c)
        for page in 0x0 0x1 0x2 0x3 0x4 0x5 0xc; do has \"LID $page (\" \"$out\"; done
        nvme error-log /dev/$c > /dev/null
        has 'critical_warning : 0' \"$(nvme smart-log /dev/$c)\"
        has 'afi : 0x1' \"$(nvme fw-log /dev/$c)\"
        nvme changed-ns-list-log /dev/$c
        out=$(nvme effects-log /dev/$c -c 0)
        has 'ACS8 [Abort' \"$out\"; has 'IOCS1 [Write ' \"$out\"; hasnt 'Format' \"$out\"
        has 'state : optimized' \"$(nvme ana-log /dev/$c)\"
        nvme get-log /dev/$c --log-id=0x80 --log-len=64 > /dev/null
        # An offset and a length of one's own: the second descriptor of the commands log is that of Get Log Page.
        has '01' \"$(nvme get-log /dev/$c --log-id=5 --log-len=4 --lpo=8 | tail -n 1)\"
        for page in 6 7 8 9 0xa 0xb 0xd 0x70 0x81 0xc0; do
            refused 'Invalid Log Page' nvme get-log /dev/$c --log-id=$page --log-len=512
        done",
    )?;
    Ok("00h to 05h, 0Ch, 80h; 10 others refused".into())
}

fn features(bench: &mut Bench) -> Result<String> {
    bench.run(
        "c=$(join $N 127.0.0.1 $N1 a -k 5)
        value() { echo $(($(nvme get-feature /dev/$c -f $1 | sed 's/.*alue:*//'))); }
        [ $(value 6) = 1 ] && [ $(value 0xf) = 5000 ] && [ $(value 0xb) = $((0x900)) ] || fail \"$(value 6) $(value 0xf) $(value 0xb)\"
        nvme set-feature /dev/$c -f 0xb -v 0x100 > /dev/null; [ $(value 0xb) = $((0x100)) ]
        refused 'Invalid Field' nvme set-feature /dev/$c -f 0xb -v 0x80000000
        for feature in 0x82 0x83; do has 'value:00000000' \"$(nvme get-feature /dev/$c -n 1 -f $feature | sed 's/0x//')\"; done
        # Host Behavior Support: Linux has said there that it knows what a retry delay is.
        has '\"01 ' \"$(nvme get-feature /dev/$c -f 0x16 -l 512 | sed 's/^0000: /\"/')\"
        for feature in 1 2 4 5 8 9 0xc 0xd 0x10 0x80 0x81 0xc0; do
            refused 'Invalid Field' nvme get-feature /dev/$c -f $feature
            # Host Identifier is what Connect said. Linux 6.12 does not let all of them through.
            how='Invalid Field'; [ $feature != 0x81 ] || how='Command Sequence Error'
            case $(nvme set-feature /dev/$c -f $feature -v 0 2>&1) in
                *\"$how\"* | 'set-feature: Permission denied') ;;
                *) fail \"set-feature $feature: $(nvme set-feature /dev/$c -f $feature -v 0 2>&1)\" ;;
            esac
        done
        refused 'Not Saveable' nvme set-feature /dev/$c -f 0xb -v 0x100 -s",
    )?;
    Ok("06h, 07h, 0Bh, 0Fh, 16h, 82h, 83h; 12 others and saving refused".into())
}

fn unsupported(bench: &mut Bench) -> Result<String> {
    bench.run(
        "c=$(join $N 127.0.0.1 $N1 a); within 10 have_disk $N 1; d=/dev/$(disk $N 1)
        opcode='Invalid Command Opcode'
        dd if=/dev/zero of=/run/firmware bs=4k count=1 2> /dev/null
        refused \"$opcode\" nvme format $d --force
        refused \"$opcode\" nvme security-recv /dev/$c -x 16 -p 0
        refused \"$opcode\" nvme security-send /dev/$c -f /run/firmware -p 0 -t 4096
        refused \"$opcode\" nvme fw-download /dev/$c -f /run/firmware
        refused \"$opcode\" nvme fw-commit /dev/$c -s 1 -a 1
        refused \"$opcode\" nvme create-ns /dev/$c -s 100 -c 100 -f 0
        refused \"$opcode\" nvme delete-ns /dev/$c -n 1
        refused \"$opcode\" nvme attach-ns /dev/$c -n 1 -c 1
        refused \"$opcode\" nvme sanitize /dev/$c -a 2
        refused \"$opcode\" nvme device-self-test /dev/$c -n 1 -s 1
        refused \"$opcode\" nvme dir-receive /dev/$c -n 1 -D 0 -O 1
        refused \"$opcode\" nvme virt-mgmt /dev/$c -c 1 -r 0 -a 7 -n 0
        refused \"$opcode\" nvme get-lba-status /dev/$c -n 1 -s 0 -m 1 -a 0x10 -l 1
        for code in 0x00 0x01 0x04 0x05 0x0d 0x11 0x14 0x1c 0x1d 0x24 0x7c 0x80 0xc0 0xff; do
            refused \"$opcode\" nvme admin-passthru /dev/$c --opcode=$code
        done
        has 'result: 0x00000001' \"$(nvme admin-passthru /dev/$c --opcode=8 --cdw10=0x30001 2>&1)\"
        refused \"$opcode\" nvme write-uncor $d -s 1 -c 1
        refused \"$opcode\" nvme verify $d -s 1 -c 1
        refused \"$opcode\" nvme copy $d --sdlba=1 --slbs=2 --blocks=1
        for code in 0x03 0x06 0x07 0x0a 0x12 0x18 0x19 0x1d 0x79 0x7d 0x80 0xff; do
            refused \"$opcode\" nvme io-passthru $d --opcode=$code -n 1
        done
        live $c",
    )?;
    Ok("Format, Security, Firmware, namespaces, 40 commands in all; Abort does not abort".into())
}

fn io(bench: &mut Bench) -> Result<String> {
    bench.run(
        "c=$(join $N 127.0.0.1 $N1 a -G -g); within 10 have_disk $N 1; d=/dev/$(disk $N 1)
        for name in a b; do dd if=/dev/urandom of=/run/$name bs=4k count=4 2> /dev/null; done
        at='-s 100 -c 31 -z 16384'
        same() { nvme read $d $at -d /run/r > /dev/null 2>&1; cmp /run/r $1; }
        nvme write $d $at -d /run/a > /dev/null 2>&1; same /run/a
        nvme compare $d $at -d /run/a > /dev/null 2>&1
        refused 'Compare Failure' nvme compare $d $at -d /run/b
        nvme write $d $at -d /run/b -f > /dev/null 2>&1; same /run/b
        nvme flush $d -n 1
        nvme write-zeroes $d -s 104 -c 7 && nvme write-zeroes $d -s 116 -c 3 -d
        cp /run/b /run/z
        dd if=/dev/zero of=/run/z bs=512 seek=4 count=8 conv=notrunc 2> /dev/null
        dd if=/dev/zero of=/run/z bs=512 seek=16 count=4 conv=notrunc 2> /dev/null
        same /run/z
        nvme dsm $d -n 1 -d -b 8 -s 120
        dd if=/dev/zero of=/run/z bs=512 seek=20 count=8 conv=notrunc 2> /dev/null
        same /run/z
        out='LBA Out of Range'
        refused \"$out\" nvme read $d -s 131070 -c 7 -z 4096 -d /run/r
        refused \"$out\" nvme write $d -s 131070 -c 7 -z 4096 -d /run/a
        refused \"$out\" nvme write-zeroes $d -s 131070 -c 7
        refused \"$out\" nvme dsm $d -n 1 -d -b 8 -s 131070
        live $c",
    )?;
    Ok("read, write, FUA, compare, flush, write zeroes with and without DEAC, deallocate; past the end refused".into())
}

fn queues(bench: &mut Bench) -> Result<String> {
    bench.run_for(
        "for options in '-i 2 -W 1 -P 1 -g -G' '-i 1 -Q 16 -g' '-i 2 -G -d' '-i 1 -Q 128 -d'; do
            c=$(join $N 127.0.0.1 $N1 a $options); within 10 have_disk $N 1; within 10 have_disk $N 2
            verify $(disk $N 1); verify $(disk $N 2)
            case $options in *-W*) has 'mapped 1/2/1' \"$(dmesg)\" ;; esac
            nvme disconnect-all
        done
        log=$(dmesg); hasnt 'digest' \"$log\"; hasnt 'I/O error' \"$log\"",
        60,
    )?;
    Ok("4 ways to connect: both digests and 4 queues, one, 16 and 128 entries, SQ flow control on and off"
        .into())
}

fn grows(bench: &mut Bench) -> Result<String> {
    bench.run("join $N 127.0.0.1 $N1 a; within 10 have_disk $N 1")?;
    let path = bench.scratch.file("n0.raw");
    let bytes = SIZE + 16 * MIB;
    let grown = OpenOptions::new().write(true).open(&path).and_then(|file| file.set_len(bytes));
    grown.map_err(|e| format!("{}: {e}", path.display()))?;
    bench.run(&format!(
        "d=$(disk $N 1); grown() {{ [ $(cat /sys/block/$d/size) = {} ]; }}; within 30 grown
        dd if=/dev/urandom of=/run/new bs=1M count=1 2> /dev/null
        dd if=/run/new of=/dev/$d bs=1M seek={last} oflag=direct conv=notrunc 2> /dev/null
        dd if=/dev/$d bs=1M skip={last} iflag=direct 2> /dev/null | cmp - /run/new",
        bytes / 512,
        last = bytes / MIB - 1
    ))?;
    Ok("by the event alone; its new end holds data".into())
}
