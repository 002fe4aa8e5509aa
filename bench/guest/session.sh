# Read by the shell of every side: runs what is typed, one line at a time, between two markers.
# The host takes the time at which the markers arrive; a line typed is `step NUMBER COMMAND...`.
export PATH=/usr/local/bin:/usr/sbin:/usr/bin LC_ALL=C
B=/bench

step() {
    number=$1
    shift
    echo "<<begin $number>>"
    "$@"
    echo "<<end $number $?>>"
}

# data MEGABYTES: a text file of that size in /tmp/data, copies of the corpus one after the other.
data() {
    rm -f /tmp/data /tmp/out
    left=$1
    while [ "$left" -ge 8 ]; do
        cat $B/corpus
        left=$((left - 8))
    done > /tmp/data
    [ "$left" = 0 ] || head -c $((left << 20)) $B/corpus >> /tmp/data
    wc -c < /tmp/data
}

count() {
    i=0
    while [ $i -lt "$1" ]; do i=$((i + 1)); done
    echo $i
}

sha256() { sha256sum < /tmp/data; }
pack_gzip() { busybox gzip -c < /tmp/data > /tmp/out; wc -c < /tmp/out; rm -f /tmp/out; }
pack_xz() { /usr/bin/xz -1 -T1 -c < /tmp/data > /tmp/out; wc -c < /tmp/out; rm -f /tmp/out; }

spawn() {
    i=0
    while [ $i -lt "$1" ]; do
        /usr/bin/busybox true || return 1
        i=$((i + 1))
    done
    echo $i
}

speed() { openssl speed -mr -elapsed -seconds "$@" 2>/dev/null; }

echo "<<ready>>"
while read -r line && [ "$line" != exit_session ]; do eval "$line"; done
