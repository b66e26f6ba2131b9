# RDMA in a guest: Soft-RoCE on the network interface, the kernel's target, a daemon of ours. The harness mounts the programs at /mnt.
NQN=nqn.2026-11.io.hawser:guest
ADDRESS=10.0.2.15
NVMET=/sys/kernel/config/nvmet
export LD_LIBRARY_PATH=/mnt

# modules NAME…: what a kernel has built in is not there.
modules() { for module in "$@"; do modprobe "$module" 2> /dev/null || true; done; }

# programs: mounts them, and copies them to where they may be replaced.
programs() {
    for disk in /sys/block/vd*; do
        [ "$(cat "$disk/serial")" = programs ] && mount -t ext4 -o ro "/dev/${disk##*/}" /mnt
    done
    mkdir -p /run/p /run/h
    cp /mnt/hawser /mnt/libhawser_verbs.so /mnt/blkclient /mnt/replay_client /run/p
}

# rdma_modules, rdma_up [INTERFACE]: an RDMA device.
rdma_modules() { modules crc32_generic rdma_rxe ib_uverbs rdma_ucm; }
rdma_up() { rdma link add rxe0 type rxe netdev "${1:-eth0}"; }

# kernel_target BYTES_IN_MIB: a namespace in memory behind nvmet-rdma.
kernel_target() {
    modprobe null_blk nr_devices=0
    modules nvmet nvmet-rdma
    mkdir /sys/kernel/config/nullb/nullb0
    for setting in memory_backed=1 size="$1" discard=1 power=1; do
        echo "${setting#*=}" > "/sys/kernel/config/nullb/nullb0/${setting%%=*}"
    done
    mkdir "$NVMET/subsystems/$NQN"
    echo 1 > "$NVMET/subsystems/$NQN/attr_allow_any_host"
    mkdir "$NVMET/subsystems/$NQN/namespaces/1"
    echo -n /dev/nullb0 > "$NVMET/subsystems/$NQN/namespaces/1/device_path"
    echo 0d1b5f6c-2a1e-4f1d-8a53-6b0c9e7f4d21 > "$NVMET/subsystems/$NQN/namespaces/1/device_uuid"
    echo 1 > "$NVMET/subsystems/$NQN/namespaces/1/enable"
    mkdir "$NVMET/ports/1"
    echo rdma > "$NVMET/ports/1/addr_trtype"
    echo ipv4 > "$NVMET/ports/1/addr_adrfam"
    echo "$ADDRESS" > "$NVMET/ports/1/addr_traddr"
    echo 4420 > "$NVMET/ports/1/addr_trsvcid"
    offer
}

# offer, withdraw: at its port.
offer() { ln -s "$NVMET/subsystems/$NQN" "$NVMET/ports/1/subsystems/"; }
withdraw() { rm "$NVMET/ports/1/subsystems/$NQN"; }

# offer_tcp: the same over TCP, at the port behind.
offer_tcp() {
    modules nvmet-tcp
    mkdir "$NVMET/ports/2"
    echo tcp > "$NVMET/ports/2/addr_trtype"
    echo ipv4 > "$NVMET/ports/2/addr_adrfam"
    echo "$ADDRESS" > "$NVMET/ports/2/addr_traddr"
    echo 4421 > "$NVMET/ports/2/addr_trsvcid"
    ln -s "$NVMET/subsystems/$NQN" "$NVMET/ports/2/subsystems/"
}

# ours, kernel_s RW BS DEPTH: requests per second of d0, and of the kernel's /dev/nvme0n1.
ours() {
    /run/p/blkclient --path=/run/h/d0.sock --rw="$1" --bs="$2" --iodepth="$3" --time_based --runtime=2 --json \
        | sed 's/.*"iops":\([0-9.]*\).*/\1/'
}
kernel_s() {
    field=8
    case $1 in write) field=49 ;; esac
    fio --name=beside --filename=/dev/nvme0n1 --direct=1 --ioengine=io_uring --rw="$1" --bs="$2" --iodepth="$3" \
        --time_based --runtime=2 --minimal | cut -d';' -f$field
}

# ways: two daemons more on the same namespace: one copies what is in several runs, one has a command for each.
ways() {
    for way in copied split; do
        mkdir -p "/run/h/$way"
        sed "s#/run/h/#/run/h/$way/#" /run/h/hawser.toml > "/run/h/$way.toml"
        case $way in copied) runs_max=1 ;; *) runs_max=1024 ;; esac
        (export HAWSER_RDMA_RUNS_MAX=$runs_max; start $way)
        wait_for 'd0: listening' "/run/h/$way.log"
    done
}

# cost WAY RUNS: one random read of d0 of so many pages, each in a run of its own: CPU microseconds of the daemon, and reads per second.
cost() {
    /run/p/blkclient --path="/run/h/$1/d0.sock" --rw=randread --bs="$(($2 * 4))k" --segment=4k --iodepth=8 --time_based --runtime=1 \
        --server_pid="$(cat "/run/h/$1.pid")" --json \
        | sed 's/.*"iops":\([0-9]*\).*"server_cpu_per_million":\([0-9]*\).*/\2 \1/'
}

# configure TEXT: what the daemon serves.
configure() {
    {
        echo '[daemon]'
        echo 'api = "/run/h/api.sock"'
        echo 'state_dir = "/run/h/var"'
        echo "$1"
    } > /run/h/hawser.toml
}

# start [NAME]: the daemon of configuration NAME (hawser).
start() {
    name=${1:-hawser}
    case $name in hawser) log=/run/h/log pid=/run/h/pid ;; *) log=/run/h/$name.log pid=/run/h/$name.pid ;; esac
    /run/p/hawser serve --config /run/h/$name.toml >> $log 2>&1 &
    echo $! > $pid
}

# end PIDFILE: SIGTERM, and its end.
end() {
    kill "$(cat "$1")"
    while [ -d "/proc/$(cat "$1")" ]; do usleep 50000; done
}

# our_target MIB: a daemon that offers files over TCP and RDMA, on their own subsystems.
our_target() {
    {
        echo '[daemon]'
        echo 'api = "/run/h/target/api.sock"'
        echo 'state_dir = "/run/h/target/var"'
        for name in guest tcp rdma; do
            truncate -s "$1M" "/run/h/$name.raw"
            case $name in tcp) listen=tcp://127.0.0.1:4421 ;; *) listen=rdma://$ADDRESS:4420 ;; esac
            echo '[[device]]'
            echo "name = \"$name\""
            echo "uri = \"file:///run/h/$name.raw\""
            echo '[[subsystem]]'
            echo "nqn = \"nqn.2026-11.io.hawser:$name\""
            echo "listen = [\"$listen\"]"
            echo '[[subsystem.namespace]]'
            echo 'nsid = 1'
            echo "device = \"$name\""
        done
    } > /run/h/target.toml
    mkdir -p /run/h/target
    start target
    wait_for 'serving: api' /run/h/target.log
}

# hawser ARGS…: asks it.
hawser() { command="$1 $2"; shift 2; /run/p/hawser $command --api /run/h/api.sock "$@"; }

# wait_for TEXT FILE [SECONDS]: until it is there, for 30 s if not said.
wait_for() {
    tries=$((${3:-30} * 10))
    until grep -qF -e "$1" "$2" 2> /dev/null; do
        tries=$((tries - 1))
        if [ $tries = 0 ]; then
            echo "no \"$1\" in $2:"
            tail -n 30 "$2"
            return 1
        fi
        usleep 100000
    done
}

# client ARGS…: a load on the disk, verified.
client() {
    /run/p/blkclient --path=/run/h/d0.sock --verify=crc32c --stall_timeout=60 "$@" || {
        tail -n 30 /run/h/log
        return 1
    }
}

# copied REASON: bytes.
copied() { hawser device list --json | sed -n "s/.*\"$1\": \([0-9]*\).*/\1/p" | head -n 1; }
