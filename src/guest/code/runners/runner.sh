# Warren's runner for bash (docs/code.md): runs what comes on descriptor 3, in this one shell, so that variables,
# functions and the working directory stay. There is no value of a last expression: a shell has none.

# An interrupt unwinds every function of the code. `return` leaves only one, so from then on each command does it, until
# the depth of the caller is reached: it, this function and `main` are the three.
__warren_run() {
    trap 'set -T; trap "(( \${#FUNCNAME[@]} > 2 )) && return 130" DEBUG; return 130' INT
    eval "$__warren_source"
}

__warren_serve() {
    local __warren_word __warren_id __warren_length __warren_mode __warren_source __warren_exit
    while read -r -u 3 __warren_word __warren_id __warren_length __warren_mode; do
        [ "$__warren_word" = run ] || continue
        # The length is in octets.
        LC_ALL=C IFS= read -r -u 3 -d '' -N "$__warren_length" __warren_source
        __warren_run
        __warren_exit=$?
        trap - DEBUG
        set +T
        trap '' INT
        printf 'done %s %s\n' "$__warren_id" "$__warren_exit" >&3
        [ "$__warren_mode" = keep ] || exit "$__warren_exit"
    done
}

trap '' INT
# A context's end is the end of its input, also for code that ends the shell's own commands.
trap 'trap "" INT' EXIT
__warren_serve
