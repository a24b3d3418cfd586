# Print an optspec for argparse to handle cmd's options that are independent of any subcommand.
function __fish_vmctl_global_optspecs
    string join \n json timeout= h/help V/version
end

function __fish_vmctl_needs_command
    # Figure out if the current invocation already has a command.
    set -l cmd (commandline -opc)
    set -e cmd[1]
    argparse -s (__fish_vmctl_global_optspecs) -- $cmd 2>/dev/null
    or return
    if set -q argv[1]
        # Also print the command, so this can be used to figure out what it is.
        echo $argv[1]
        return 1
    end
    return 0
end

function __fish_vmctl_using_subcommand
    set -l cmd (__fish_vmctl_needs_command)
    test -z "$cmd"
    and return 1
    contains -- $cmd[1] $argv
end

complete -c vmctl -n "__fish_vmctl_needs_command" -l timeout -d 'Give up when there is no answer after this time' -r
complete -c vmctl -n "__fish_vmctl_needs_command" -l json -d 'Print JSON on standard output, one object a line'
complete -c vmctl -n "__fish_vmctl_needs_command" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vmctl -n "__fish_vmctl_needs_command" -s V -l version -d 'Print version'
complete -c vmctl -n "__fish_vmctl_needs_command" -a "status" -d 'Say who has the guest and what it does, or how far the migration is'
complete -c vmctl -n "__fish_vmctl_needs_command" -a "pause" -d 'Pause the guest until it is resumed; returns when every vCPU has stopped'
complete -c vmctl -n "__fish_vmctl_needs_command" -a "resume" -d 'Let the guest go on'
complete -c vmctl -n "__fish_vmctl_needs_command" -a "quit" -d 'End the guest and its vmrun; returns when that is under way'
complete -c vmctl -n "__fish_vmctl_needs_command" -a "events" -d 'Print what happens, until the program ends'
complete -c vmctl -n "__fish_vmctl_needs_command" -a "machine" -d 'Describe the machine as another host must be able to make it'
complete -c vmctl -n "__fish_vmctl_needs_command" -a "progress" -d 'vmsend: say how far the migration is'
complete -c vmctl -n "__fish_vmctl_needs_command" -a "set" -d 'vmsend: change settings of the migration under way'
complete -c vmctl -n "__fish_vmctl_needs_command" -a "cancel" -d 'vmsend: give up; the guest stays at the source'
complete -c vmctl -n "__fish_vmctl_needs_command" -a "switch-now" -d 'vmsend: switch over as soon as possible, whatever downtime that costs'
complete -c vmctl -n "__fish_vmctl_using_subcommand status" -l timeout -d 'Give up when there is no answer after this time' -r
complete -c vmctl -n "__fish_vmctl_using_subcommand status" -l json -d 'Print JSON on standard output, one object a line'
complete -c vmctl -n "__fish_vmctl_using_subcommand status" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vmctl -n "__fish_vmctl_using_subcommand pause" -l timeout -d 'Give up when there is no answer after this time' -r
complete -c vmctl -n "__fish_vmctl_using_subcommand pause" -l json -d 'Print JSON on standard output, one object a line'
complete -c vmctl -n "__fish_vmctl_using_subcommand pause" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vmctl -n "__fish_vmctl_using_subcommand resume" -l timeout -d 'Give up when there is no answer after this time' -r
complete -c vmctl -n "__fish_vmctl_using_subcommand resume" -l force -d 'Do it although a migration has paused the guest, or (with --peer-fenced) has sent it away'
complete -c vmctl -n "__fish_vmctl_using_subcommand resume" -l peer-fenced -d 'The other host is certain not to run the guest: by your word, nothing here checks it'
complete -c vmctl -n "__fish_vmctl_using_subcommand resume" -l json -d 'Print JSON on standard output, one object a line'
complete -c vmctl -n "__fish_vmctl_using_subcommand resume" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vmctl -n "__fish_vmctl_using_subcommand quit" -l timeout -d 'Give up when there is no answer after this time' -r
complete -c vmctl -n "__fish_vmctl_using_subcommand quit" -l force -d 'Do it also while a migration is under way or the guest may be the only copy'
complete -c vmctl -n "__fish_vmctl_using_subcommand quit" -l json -d 'Print JSON on standard output, one object a line'
complete -c vmctl -n "__fish_vmctl_using_subcommand quit" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vmctl -n "__fish_vmctl_using_subcommand events" -l timeout -d 'Give up when there is no answer after this time' -r
complete -c vmctl -n "__fish_vmctl_using_subcommand events" -l json -d 'Print JSON on standard output, one object a line'
complete -c vmctl -n "__fish_vmctl_using_subcommand events" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vmctl -n "__fish_vmctl_using_subcommand machine" -l timeout -d 'Give up when there is no answer after this time' -r
complete -c vmctl -n "__fish_vmctl_using_subcommand machine" -l json -d 'Print JSON on standard output, one object a line'
complete -c vmctl -n "__fish_vmctl_using_subcommand machine" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vmctl -n "__fish_vmctl_using_subcommand progress" -l timeout -d 'Give up when there is no answer after this time' -r
complete -c vmctl -n "__fish_vmctl_using_subcommand progress" -l json -d 'Print JSON on standard output, one object a line'
complete -c vmctl -n "__fish_vmctl_using_subcommand progress" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vmctl -n "__fish_vmctl_using_subcommand set" -l downtime -d 'Let the guest stand still for no longer than this' -r
complete -c vmctl -n "__fish_vmctl_using_subcommand set" -l bwlimit -d 'Send no more than this; 0 is no limit' -r
complete -c vmctl -n "__fish_vmctl_using_subcommand set" -l timeout -d 'Give up when there is no answer after this time' -r
complete -c vmctl -n "__fish_vmctl_using_subcommand set" -l json -d 'Print JSON on standard output, one object a line'
complete -c vmctl -n "__fish_vmctl_using_subcommand set" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vmctl -n "__fish_vmctl_using_subcommand cancel" -l timeout -d 'Give up when there is no answer after this time' -r
complete -c vmctl -n "__fish_vmctl_using_subcommand cancel" -l json -d 'Print JSON on standard output, one object a line'
complete -c vmctl -n "__fish_vmctl_using_subcommand cancel" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vmctl -n "__fish_vmctl_using_subcommand switch-now" -l timeout -d 'Give up when there is no answer after this time' -r
complete -c vmctl -n "__fish_vmctl_using_subcommand switch-now" -l json -d 'Print JSON on standard output, one object a line'
complete -c vmctl -n "__fish_vmctl_using_subcommand switch-now" -s h -l help -d 'Print help (see more with \'--help\')'
