//! Discovery, connecting and staying connected, and who may.

#![forbid(unsafe_code)]

use super::{Bench, Check};
use crate::Result;

pub(super) const CHECKS: &[Check] = &[
    ("discovery_lists_what_a_host_may_use", lists),
    ("connect_all_follows_the_referral", connect_all),
    ("a_persistent_discovery_controller_is_told_of_changes", persistent),
    ("a_host_that_is_not_allowed_is_refused", refused),
    ("keep_alive_holds_an_idle_association", keep_alive),
];

fn lists(bench: &mut Bench) -> Result<String> {
    bench.run(
        "log=$(nvme discover -t tcp -a 127.0.0.1 -s $N1 $(as a))
        for text in \"Records 5,\" \"subnqn: $N\" \"trsvcid: $N2\" 'traddr: 127.0.0.2' \"subnqn: $R\" \\
            'subtype: discovery subsystem referral' \"trsvcid: $O1\"; do has \"$text\" \"$log\"; done
        hasnt \"$C\" \"$log\"
        # Two addresses are two ports.
        [ $(echo \"$log\" | grep '^portid:' | sort -u | wc -l) -ge 2 ] || fail \"port IDs: $log\"
        log=$(nvme discover -t tcp -a 127.0.0.2 -s $N2 $(as b))
        has 'Records 6,' \"$log\"; has \"subnqn: $C\" \"$log\"",
    )?;
    Ok("5 records, and 6 for the host that may do more".into())
}

fn connect_all(bench: &mut Bench) -> Result<String> {
    bench.run(
        "nvme connect-all -t tcp -a 127.0.0.1 -s $N1 $(as a)
        for where in \"$N 127.0.0.1 $N1\" \"$N 127.0.0.2 $N2\" \"$R 127.0.0.1 $R1\" \"$R 127.0.0.2 $R2\" \"$O 127.0.0.1 $O1\"; do
            live $(controller $where a) || fail \"not connected: $where\"
        done
        if controller $C 127.0.0.1 $C1 a; then fail 'connected to what is not allowed'; fi
        within 10 have_disk $O 1; within 10 have_disk $N 1; within 10 have_disk $N 2",
    )?;
    Ok("5 associations, one by referral".into())
}

fn persistent(bench: &mut Bench) -> Result<String> {
    bench.run(
        "nvme discover -p -t tcp -a 127.0.0.1 -s $N1 $(as a) > /run/before
        live $(controller $discovery 127.0.0.1 $N1 a)
        uevent sh -c env > /run/uevents 2>&1 & echo $! > /run/uevent.pid
        # What happens before it listens (netlink 15, group 1) it does not see.
        within 10 grep -Eq ' 15 +[0-9]+ +00000001 ' /proc/net/netlink",
    )?;
    bench.target.put("/v1/discovery", "{\"referrals\":[]}")?;
    let changed = bench.run(
        "within 10 grep -q NVME_AEN=0x70f002 /run/uevents
        kill $(cat /run/uevent.pid)
        log=$(nvme discover -d $(controller $discovery 127.0.0.1 $N1 a) -t tcp -a 127.0.0.1 -s $N1 $(as a))
        hasnt referral \"$log\"; has 'Records 4,' \"$log\"
        [ \"$(grep -o 'counter.*' /run/before)\" != \"$(echo \"$log\" | grep -o 'counter.*')\" ] || fail 'the same GENCTR'",
    );
    let referral = format!("{{\"referrals\":[\"tcp://{}\"]}}", bench.other.listener(super::OTHER)?);
    bench.target.put("/v1/discovery", &referral)?;
    changed?;
    Ok("a referral taken away: event, another log, another GENCTR".into())
}

fn refused(bench: &mut Bench) -> Result<String> {
    bench.run(
        "if nvme connect -t tcp -a 127.0.0.1 -s $C1 -n $C $(as a); then fail 'host a was let in'; fi
        has \"Connect for subsystem $C is not allowed\" \"$(dmesg | tail -n 3)\"
        live $(join $C 127.0.0.1 $C1 b)",
    )?;
    Ok("by name; the other host is let in".into())
}

fn keep_alive(bench: &mut Bench) -> Result<String> {
    bench.run(
        "c=$(join $N 127.0.0.1 $N1 a -k 2)
        was=$(cat /sys/class/nvme/$c/cntlid)
        [ $(($(nvme get-feature /dev/$c -f 0xf | sed 's/.*value:*//'))) = 2000 ] || fail \"KATO: $(nvme get-feature /dev/$c -f 0xf)\"
        sleep 5
        live $c && [ \"$(cat /sys/class/nvme/$c/cntlid)\" = \"$was\" ] || fail 'another controller'
        log=$(dmesg); hasnt reconnect \"$log\"; hasnt 'keep-alive' \"$log\"",
    )?;
    Ok("KATO 2 s, idle for 5".into())
}
