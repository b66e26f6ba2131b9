# What the checks of the kernel's NVMe host are written with. The harness puts names and ports before it: N, R, C, O are NQNs,
# N1 N2 R1 R2 C1 O1 the ports of their listeners, at 127.0.0.1 and 127.0.0.2.
discovery=nqn.2014-08.org.nvmexpress.discovery

# id HOST: the identifier of host a, b or c.
id() {
    case $1 in
        a) echo 11111111-aaaa-4aaa-8aaa-111111111111 ;;
        b) echo 22222222-bbbb-4bbb-8bbb-222222222222 ;;
        *) echo 33333333-cccc-4ccc-8ccc-333333333333 ;;
    esac
}

# as HOST: nvme-cli's options.
as() { echo "--hostnqn=nqn.2014-08.org.nvmexpress:uuid:$(id $1) --hostid=$(id $1)"; }

# fail TEXT…: ends the check.
fail() { echo "$*"; exit 1; }

# has TEXT WHERE, hasnt TEXT WHERE: is it there, whatever the spaces between words?
has() { echo "$2" | tr -s ' \t' ' ' | grep -qF -e "$1" || fail "no \"$1\" in: $2"; }
hasnt() { if echo "$2" | tr -s ' \t' ' ' | grep -qF -e "$1"; then fail "\"$1\" in: $2"; fi; }

# refused TEXT COMMAND…: it must fail with that text.
refused() {
    refusal=$1
    shift
    if said=$("$@" 2>&1); then fail "not refused: $*: $said"; fi
    case $said in *"$refusal"*) ;; *) fail "$*: \"$said\", not \"$refusal\"" ;; esac
}

# within SECONDS COMMAND…: it must come true.
within() {
    tries=$(($1 * 10))
    seconds=$1
    shift
    until "$@"; do
        tries=$((tries - 1))
        [ $tries -gt 0 ] || fail "not within $seconds s: $*"
        usleep 100000
    done
}

# controller NQN ADDRESS PORT HOST: its name.
controller() {
    for ctrl in /sys/class/nvme/nvme*; do
        [ "$(cat $ctrl/subsysnqn 2> /dev/null)" = "$1" ] || continue
        grep -q "traddr=$2,trsvcid=$3" $ctrl/address || continue
        [ "$(cat $ctrl/hostid)" = "$(id $4)" ] && echo ${ctrl##*/} && return
    done
    return 1
}
live() { [ "$(cat /sys/class/nvme/$1/state)" = live ]; }
not_live() { ! live $1; }

# join NQN ADDRESS PORT HOST [OPTIONS]: connects; says the controller's name.
join() {
    nqn=$1 address=$2 port=$3 host=$4
    shift 4
    said=$(nvme connect -t tcp -a $address -s $port -n $nqn $(as $host) "$@" 2>&1) || fail "connect: $said"
    controller $nqn $address $port $host || fail "no controller of $nqn"
}

# another NQN ADDRESS PORT HOST: as join, for one of several hosts of this guest, which nvme-cli does not tell apart.
another() {
    echo "transport=tcp,traddr=$2,trsvcid=$3,nqn=$1,hostnqn=nqn.2014-08.org.nvmexpress:uuid:$(id $4),hostid=$(id $4),\
nr_io_queues=1,reconnect_delay=1" > /dev/nvme-fabrics || fail "connect: $*"
    controller $1 $2 $3 $4 || fail "no controller of $1"
}

# disk NQN NSID: its block device's name; the one that stands for all paths.
disk() {
    for block in /sys/block/nvme*; do
        case ${block##*/} in *c*n*) continue ;; esac
        [ "$(cat $block/device/subsysnqn)" = "$1" ] && [ "$(cat $block/nsid)" = "$2" ] && echo ${block##*/} && return
    done
    return 1
}
have_disk() { disk "$@" > /dev/null && [ -b /dev/$(disk "$@") ]; }

# path CONTROLLER: the folder of its first namespace's hidden disk.
path() { for block in /sys/class/nvme/$1/nvme*c*n*; do [ "$(cat $block/nsid)" = 1 ] && echo $block && return; done; }
ana() { [ "$(cat $(path $1)/ana_state)" = "$2" ]; }
ios() { awk '{print $1 + $5}' $(path $1)/stat; }
# busy CONTROLLER, idle CONTROLLER: does I/O go that way?
moves() { first=$(ios $1); usleep 300000; [ $(ios $1) -gt $first ]; }
busy() { within 15 moves $1; }
idle() { usleep 200000; if moves $1; then fail "I/O goes over $1"; fi; }

# load DISK: fio with verify in the background, again and again. loaded: ends it, and it must have found nothing.
load() {
    rm -f /run/load.*
    (
        while [ ! -e /run/load.end ]; do
            fio --name=load --filename=/dev/$1 --direct=1 --ioengine=io_uring --iodepth=8 --rw=randwrite --bs=8k --size=16M \
                --verify=crc32c --verify_backlog=128 --verify_fatal=1 --serialize_overlap=1 --time_based --runtime=3 \
                > /run/load.out 2>&1 || break
        done
        touch /run/load.status
    ) &
}
loading() { [ ! -e /run/load.status ] || fail "the load ended: $(cat /run/load.out)"; }
loaded() {
    loading
    touch /run/load.end
    within 60 test -e /run/load.status
    grep -q 'err= 0' /run/load.out || fail "load: $(cat /run/load.out)"
}

# verify DISK [OPTIONS]: a short fio with verify in the foreground.
verify() {
    on=$1
    shift
    said=$(fio --name=verify --filename=/dev/$on --direct=1 --ioengine=io_uring --iodepth=16 --rw=randwrite --bsrange=4k-64k \
        --size=3M --verify=crc32c --verify_fatal=1 --numjobs=2 --offset_increment=16M "$@" 2>&1) || fail "fio: $said"
}
