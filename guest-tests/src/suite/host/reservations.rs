//! Reservations between three hosts, with nvme-cli.
//!
//! The hosts are three associations of one guest, each with its own host identifier; commands go to a controller's own
//! character device, and so by its path.

#![forbid(unsafe_code)]

use super::{Bench, Check, RESERVED};
use crate::Result;

pub(super) const CHECKS: &[Check] = &[
    ("each_type_of_reservation_lets_through_whom_it_should", types),
    ("keys_preemption_and_clearing", preempt),
    ("a_reservation_outlives_the_target_s_death", persists),
];

/// Hosts a, b and c at one address, a at the other one too; then `$a`, `$b`, `$c` and `$two` are their devices.
const JOIN: &str = "for host in a b c; do another $R 127.0.0.1 $R1 $host; done; another $R 127.0.0.2 $R2 a
    within 10 have_disk $R 1\n";

const NAMES: &str = "a=/dev/$(controller $R 127.0.0.1 $R1 a); b=/dev/$(controller $R 127.0.0.1 $R1 b)
    c=/dev/$(controller $R 127.0.0.1 $R1 c); two=/dev/$(controller $R 127.0.0.2 $R2 a)
    resv() { what=$1; shift; nvme resv-$what \"$@\" -n 1; }
    report() { nvme resv-report ${1:-$a} -n 1 -e; }
    conflict='Reservation Conflict'
    writes() { nvme io-passthru $1 --opcode=1 -n 1 -l 512 -w -i /dev/zero > /dev/null 2>&1; }
    reads() { nvme io-passthru $1 --opcode=2 -n 1 -l 512 -r > /dev/null 2>&1; }
    # may write|read DEVICE yes|no
    may() {
        if ${1}s $2; then [ $3 = yes ] || fail \"type $type: $2 may $1\"; return; fi
        [ $3 = no ] || fail \"type $type: $2 may not $1\"
        code=2; [ $1 = read ] || code=1
        refused \"$conflict\" nvme io-passthru $2 --opcode=$code -n 1 -l 512 --$1 -i /dev/zero
    }\n";

fn types(bench: &mut Bench) -> Result<String> {
    bench.run_for(
        &format!(
            "{JOIN}{NAMES}resv register $a -k 0xa; resv register $b -k 0xb
            # type, then write and read: the registered other host, and the one that is not registered
            for row in '1 no yes no yes' '2 no no no no' '3 yes yes no yes' '4 yes yes no no' '5 yes yes no yes' '6 yes yes no no'; do
                set -- $row; type=$1
                resv acquire $a -c 0xa -t $type -a 0
                out=$(report); has \"rtype : $type\" \"$out\"; has 'regctl : 2' \"$out\"
                may write $a yes; may read $a yes; may write $two yes; may read $two yes
                may write $b $2; may read $b $3; may write $c $4; may read $c $5
                # Those that only read or only write, by their effect.
                [ $4 = yes ] || refused \"$conflict\" nvme write-zeroes $c -n 1 -s 0 -c 0
                [ $5 = yes ] || refused \"$conflict\" nvme compare $c -n 1 -s 0 -c 0 -z 512 -d /dev/zero
                refused \"$conflict\" resv acquire $c -c 0xc -t 1 -a 0
                resv release $a -c 0xa -t $type -a 0
                has 'rtype : 0' \"$(report)\"
            done
            resv release $a -c 0xa -a 1"
        ),
        60,
    )?;
    Ok("6 types, 3 hosts, one of them at two addresses".into())
}

fn preempt(bench: &mut Bench) -> Result<String> {
    bench.run_for(
        &format!(
            "{JOIN}{NAMES}type=1
            resv register $a -k 0xa; resv register $a -k 0xa
            refused \"$conflict\" resv register $a -k 0xf
            resv register $b -k 0xb; resv register $a -c 0xa -k 0xaa -r 2
            refused \"$conflict\" resv acquire $a -c 0xa -t 1 -a 0
            resv acquire $a -c 0xaa -t 1 -a 0
            refused \"$conflict\" resv acquire $b -c 0xb -t 1 -a 0
            refused \"$conflict\" resv acquire $b -c 0xb -p 0xdead -t 1 -a 1
            refused 'Invalid Field' resv release $a -c 0xaa -t 3 -a 0
            has 'rkey : aa' \"$(report)\"
            # Preempt: a is registered no more, at neither of its addresses.
            resv acquire $b -c 0xb -p 0xaa -t 1 -a 1
            out=$(report); has 'regctl : 1' \"$out\"; has 'rkey : b' \"$out\"; has 'rcsts : 1' \"$out\"
            may write $a no; may write $two no; may write $b yes
            # Preempt and abort, back.
            resv register $two -k 0xa; resv acquire $two -c 0xa -p 0xb -t 2 -a 2
            type=2; may read $b no; may write $a yes; has 'rtype : 2' \"$(report $b)\"
            refused \"$conflict\" resv release $b -c 0xb -t 2 -a 1
            # The holder's unregistering ends its reservation; clearing ends everything.
            resv register $a -c 0xa -r 1; has 'regctl : 0' \"$(report)\"; may write $c yes
            resv register $a -k 0xa; resv register $c -k 0xc; resv acquire $c -c 0xc -t 4 -a 0
            resv release $a -c 0xa -a 1
            out=$(report); has 'regctl : 0' \"$out\"; has 'rtype : 0' \"$out\"
            refused 'Host Identifier Inconsistent Format' resv report $a
            refused 'Invalid Field' resv acquire $a -c 0xa -t 1 -a 0 -i"
        ),
        60,
    )?;
    Ok("register, replace, preempt, preempt and abort, unregister, clear, wrong keys".into())
}

fn persists(bench: &mut Bench) -> Result<String> {
    bench.run(&format!(
        "{JOIN}{NAMES}resv register $a -k 0xa -p 3; resv register $b -k 0xb; resv acquire $a -c 0xa -t 3 -a 0
        has 'ptpls : 1' \"$(report)\""
    ))?;
    bench.target.kill()?;
    bench.target.launch()?;
    bench.run_for(
        &format!(
            "{NAMES}for device in $a $b $c $two; do within 20 live ${{device#/dev/}}; done
            type=3
            out=$(report); has 'rtype : 3' \"$out\"; has 'regctl : 2' \"$out\"; has 'ptpls : 1' \"$out\"
            may write $a yes; may write $b yes; may write $c no; may read $c yes
            resv release $b -c 0xb -a 1; may write $c yes; resv register $a -k 0xa -p 2; has 'ptpls : 0' \"$(report)\"
            resv register $a -c 0xa -r 1"
        ),
        40,
    )?;
    Ok(format!("{RESERVED}: kill -9 and start: type, keys and holder as before"))
}
