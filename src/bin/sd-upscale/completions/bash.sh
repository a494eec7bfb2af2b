# Completions of sd-upscale for bash 4.4 and newer: source <(sd-upscale --completions bash)
_sd_upscale() {
    # A space in a name comes with the backslash that was typed.
    local last=${2//\\/} word begun before split=() words=() candidates=() candidate
    # Bash splits at = and : as well, which stand within our words; with nothing behind it, one of these is the last word.
    split=("${COMP_WORDS[@]:0:COMP_CWORD}")
    [[ ${COMP_WORDS[COMP_CWORD]} == [=:] ]] && split+=("${COMP_WORDS[COMP_CWORD]}")
    for word in "${split[@]}" "$last"; do
        if ((${#words[@]} > 1)) && [[ $word == [=:]* || ${words[-1]} == *[=:] ]]; then
            words[-1]+=$word
        else
            words+=("$word")
        fi
    done
    begun=${words[-1]}
    # What of it bash takes for words of their own, and does not replace.
    before=${begun%"$last"}
    # Long options rather than short ones.
    [[ $begun == - ]] && words[-1]=--
    mapfile -t candidates < <(
        SD_UPSCALE_COMPLETE=bash _CLAP_IFS=$'\n' _CLAP_COMPLETE_INDEX=$((${#words[@]} - 1)) \
            "$1" -- "${words[@]}" 2>/dev/null
    )
    COMPREPLY=()
    for candidate in "${candidates[@]}"; do
        # Options are shown where one was begun, not among files.
        [[ -z $candidate || -z $begun && $candidate == -?* ]] && continue
        candidate=${candidate#"$before"}
        # Bash quotes what is a file, and ends folders by a slash.
        [[ -e ${candidate/#\~\//$HOME/} ]] && compopt -o filenames
        [[ $candidate == ?*/ ]] && candidate=${candidate%/}
        COMPREPLY+=("$candidate")
    done
}
complete -o nosort -F _sd_upscale sd-upscale
