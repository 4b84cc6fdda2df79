#!/bin/sh
# Counts the processes of a program.
. ./warren-plugin.sh

PLUGIN_NAME=processes
PLUGIN_VERSION=1.0.0

collect() {
    count=0
    for file in /proc/[0-9]*/comm; do
        # A process may have ended since the list was made.
        IFS= read -r name 2>/dev/null < "$file" || continue
        [ "$name" = "$config_program" ] && count=$((count + 1))
    done
    sample processes_running "$count" gauge "program=$config_program"
}

serve
