# Runs in a guest and on the host, with the same busybox: both must print the same.
# Argument: a folder to work in.
cd "$1" || exit 1
umask 022

echo "== arithmetic"
echo $((6 * 7)) $((1 << 40)) $((-17 / 5)) $((-17 % 5)) $((0x7fffffffffffffff))
i=0
sum=0
while [ $i -lt 2000 ]; do
    sum=$(((sum * 31 + i) & 0xffffffff))
    i=$((i + 1))
done
echo $sum

echo "== processes"
(exit 7)
echo $?
sh -c 'kill -KILL $$'
echo $?
for n in 1 2 3 4 5; do (exit $n) & eval "pid$n=$!"; done
for n in 5 4 3 2 1; do
    eval "wait \$pid$n"
    echo "child $n: $?"
done
i=0
while [ $i -lt 30 ]; do
    busybox true || echo failed
    i=$((i + 1))
done
env -i A=b sh -c 'echo $A; export A=c; sh -c "echo \$A"'

echo "== signals"
trap 'echo got USR1' USR1
kill -USR1 $$
trap 'echo got TERM; exit 9' TERM
(
    trap 'echo child got TERM; exit 5' TERM
    while :; do sleep 0.05; done
) &
child=$!
sleep 0.3
kill -TERM $child
wait $child
echo "status $?"
trap - TERM USR1

echo "== pipes"
seq 1 5000 | sort -rn | awk '{ s += $1 } END { print NR, s }'
seq 1 20000 | sed 's/7/seven/g' | tr a-z A-Z | grep -c SEVEN
mkfifo channel
(seq 1 100 > channel) &
paste -s -d+ channel | bc
wait
rm channel
yes ringfence | head -n 1000 | md5sum
cat <<END | wc
one two three
four
END

echo "== files"
seq 1 30000 > numbers
sha256sum numbers
gzip -c numbers > numbers.gz
gunzip -c numbers.gz | cmp - numbers && echo same
mkdir -p a/b/c
touch a/b/c/d a/e
ln -s e a/link
find a | sort
cp -r a copy && rm -r a && ls copy copy/b/c
tar cf - copy numbers | tar tf - | sort
dd if=numbers of=part bs=1000 skip=3 count=2 2> /dev/null
sha1sum part
rm -r copy numbers numbers.gz part

echo "== floating point"
awk 'BEGIN {
    for (i = 1; i <= 12; i++)
        printf "%.17g %.12e %g\n", i / 7, 1 / (i * i * i), i * 0.1
    x = 0.5; for (i = 0; i < 2000; i++) x = 3.7 * x * (1 - x)
    printf "%.17g\n", x
    s = 0; for (i = 1; i <= 20000; i++) s += 1 / (i * i)
    printf "%.17g\n", s
    print 1e308 * 10, -1e308 * 10, 9007199254740992 + 1, int(-3.7), 17 % 5.5
}'
echo 'scale=60; 4*a(1); e(1); sqrt(2)' | bc -l
echo '2^200; 7^77 % 1000003; define f(n) { if (n < 2) return 1; return n * f(n - 1); }; f(50)' | bc

echo "== the program"
[ ! -x ./life ] || ./life
echo "status $?"
