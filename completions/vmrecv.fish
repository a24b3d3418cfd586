complete -c vmrecv -l control -d 'Control socket of the vmrun that takes the guest' -r -F
complete -c vmrecv -l serial -d 'What the guest\'s serial port is connected to: stdio, file:PATH, pty or none' -r
complete -c vmrecv -l hugepages -d 'Make the guest\'s memory of pages of this size: 4K, 2M or thp' -r
complete -c vmrecv -l remap -d 'Replace the host end of a device, as in serial0=file:/var/log/guest' -r
complete -c vmrecv -l vmrun -d 'The vmrun program to start; the one beside vmrecv by default' -r -F
complete -c vmrecv -l peer-timeout -d 'Take the other side for dead after it was silent for so long' -r
complete -c vmrecv -l linger -d 'Wait this long for a source that was lost after the guest began to run here' -r
complete -c vmrecv -l log -d 'Log messages of this level and above on standard error' -r -f -a "error\t'What went wrong'
warn\t'Also what deserves attention'
info\t'Also what happens'
debug\t'Also why'
trace\t'Everything'"
complete -c vmrecv -l attach -d 'Use the vmrun --incoming that listens on --control already'
complete -c vmrecv -l resume -d 'Take over from a vmrecv that was killed while the guest was acknowledged, or lacked pages'
complete -c vmrecv -l insecure -d 'Allow TCP beyond loopback, without encryption or authentication'
complete -c vmrecv -l no-sandbox -d 'Do not confine this program, for debugging'
complete -c vmrecv -l json -d 'Print JSON on standard output, one object a line, the result last'
complete -c vmrecv -s q -l quiet -d 'Print nothing but errors on standard error'
complete -c vmrecv -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vmrecv -s V -l version -d 'Print version'
