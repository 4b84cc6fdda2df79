#!/bin/sh
# Answers every line on standard input with one of the Influx line protocol.
while IFS= read -r _; do
    read -r one five _ < /proc/loadavg
    printf 'load,source=proc one=%s,five=%s\n' "$one" "$five"
done
