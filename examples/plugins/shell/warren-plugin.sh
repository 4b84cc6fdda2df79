# A native plugin for the sentinel in POSIX sh. Define collect, and validate and test where the manifest's rules are not
# enough; set PLUGIN_NAME and PLUGIN_VERSION; call serve. See docs/plugins.md.
#
# A task's fields come as variables: $device_host, $config_depth; lists and tables as JSON. Requests are served one after
# the other. Nothing else may write to standard output.

# sample NAME VALUE [TYPE [LABEL=TEXT]...]: says what was measured.
sample() {
    _line="$_tag item name=$1 value=$2"
    [ -z "${3-}" ] || _line="$_line type=$3"
    shift; shift
    [ $# -eq 0 ] || shift
    for _label; do
        _text=$(printf %s "${_label#*=}" | tr '\n' ' ' | sed 's/[\\"]/\\&/g')
        _line="$_line l.${_label%%=*}=\"$_text\""
    done
    printf '%s\n' "$_line"
}

# fail SENTENCE: ends the request with an error; to be followed by `return 1`.
fail() {
    _failed=$1
}

validate() { :; }
check() { :; }

# Sets variables from the words `device.NAME=VALUE` and `config.NAME=VALUE`. Values are taken apart with sed and set by
# `read`, never evaluated.
_arguments() {
    _rest=$1
    while [ -n "$_rest" ]; do
        _key=${_rest%%=*}
        _rest=${_rest#*=}
        case $_rest in
        \"*)
            _quoted=$(printf '%s\n' "$_rest" | sed -n 's/^"\(\([^"\\]\|\\.\)*\)".*/\1/p')
            _rest=${_rest#\"}
            _rest=${_rest#"$_quoted"}
            _rest=${_rest#\"}
            _value=$(printf '%s\n' "$_quoted" | sed 's/\\\(["\\]\)/\1/g')
            ;;
        *)
            _value=${_rest%% *}
            _rest=${_rest#"$_value"}
            ;;
        esac
        _rest=${_rest# }
        case $_key in
        device.*[!a-z0-9_.]* | config.*[!a-z0-9_.]*) ;;
        device.* | config.*)
            IFS= read -r "$(printf %s "$_key" | tr . _)" <<END
$_value
END
            ;;
        esac
    done
}

serve() {
    while IFS=' ' read -r _tag _verb _rest; do
        _failed=
        case $_verb in
        hello) printf '%s ok protocol=1 name=%s version=%s\n' "$_tag" "$PLUGIN_NAME" "$PLUGIN_VERSION" ;;
        close) printf '%s ok\n' "$_tag"; return 0 ;;
        cancel) ;;
        validate | test | collect)
            _arguments "$_rest"
            [ "$_verb" = test ] && _verb=check
            if "$_verb"; then
                printf '%s ok\n' "$_tag"
            else
                printf '%s err FAILED "%s"\n' "$_tag" "$(printf %s "${_failed:-failed}" | sed 's/[\\"]/\\&/g')"
            fi
            ;;
        *) printf '%s err UNKNOWN_VERB "%s is not known"\n' "$_tag" "$_verb" ;;
        esac
    done
}
