complete -c vmsend -l vm -d 'Control socket of the vmrun that has the guest' -r -F
complete -c vmsend -l control -d 'Make a control socket for vmctl: progress, set, switch-now, cancel, events' -r -F
complete -c vmsend -l mode -d 'When pages are sent' -r -f -a "precopy\t'All before the guest runs at the destination'
hybrid\t'Passes first; what they cannot keep up with, after it'
postcopy\t'All after it, but its kernel: the guest moves at once and fetches its pages as it needs them'"
complete -c vmsend -l downtime -d 'Let the guest stand still for no longer than this' -r
complete -c vmsend -l timeout -d 'After this time, do what --on-timeout says; no limit by default' -r
complete -c vmsend -l max-passes -d 'After this many passes, do what --on-timeout says; no limit by default' -r
complete -c vmsend -l warm-up -d 'Postcopy: send the guest\'s kernel ahead for this long at most; 0s: not at all' -r
complete -c vmsend -l on-timeout -d 'What to do when the downtime is not reached' -r -f -a "cancel\t'Give up; the guest goes on at the source (exit code 4)'
force\t'Switch over all the same, whatever the downtime'
postcopy\t'Switch over at once, and send the rest after the guest'"
complete -c vmsend -l bwlimit -d 'Send no more than this; 0 is no limit' -r
complete -c vmsend -l channels -d 'Number of connections that carry pages, 1 to 64' -r
complete -c vmsend -l peer-timeout -d 'Take the other side for dead after it was silent for so long' -r
complete -c vmsend -l connect-timeout -d 'Give up connecting after this time' -r
complete -c vmsend -l recover-timeout -d 'Try this long to reach the destination again; 1m, or for ever, by default' -r
complete -c vmsend -l log -d 'Log messages of this level and above on standard error' -r -f -a "error\t'What went wrong'
warn\t'Also what deserves attention'
info\t'Also what happens'
debug\t'Also why'
trace\t'Everything'"
complete -c vmsend -l verify -d 'Compare digests of all RAM before the switchover'
complete -c vmsend -l keep-source -d 'Leave the source\'s vmrun and the guest\'s remains, instead of ending it'
complete -c vmsend -l insecure -d 'Allow TCP beyond loopback, without encryption or authentication'
complete -c vmsend -l resume -d 'Go on with a migration whose vmsend ended after the guest was committed'
complete -c vmsend -l status -d 'Say who has the guest, what its migration does, and what it waits for; do nothing'
complete -c vmsend -l revoke -d 'With --resume: ask for the guest back if the destination has not run it'
complete -c vmsend -l no-sandbox -d 'Do not confine this program, for debugging'
complete -c vmsend -l json -d 'Print JSON on standard output, one object a line, the result last'
complete -c vmsend -s q -l quiet -d 'Print nothing but errors on standard error'
complete -c vmsend -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vmsend -s V -l version -d 'Print version'
