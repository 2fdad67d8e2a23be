# shellcheck shell=bash disable=SC2154  # install.sh, files.sh and opennebula.sh set the rest
# OpenNebula from 6.0 on: beside the stock LXC driver, or (--replace) in its place.
#
# Its own files are read and never written. What it has that is not about any one hypervisor (the monitoring client, the
# probes for NUMA, PCI, datastores …) is copied from the installation, not linked: a link that an upgrade leaves
# dangling makes rsync fail, and with it the monitoring of every host. After an upgrade of OpenNebula, install.sh again.

# Every directory has to be there, also one without a probe, or START_MONITOR fails and the host goes to ERROR.
probe_directories=(host host/beacon host/monitor host/system vm vm/execution vm/monitor vm/snapshot vm/status)

# What the stock probes for KVM and LXC share, by name as of 6.0 to 7.4; absent ones (nfs_automounted came later) are none.
generic_probes=(host/monitor/numa_usage.rb host/system/architecture.sh host/system/cpu.sh host/system/monitor_ds.rb
    host/system/name.sh host/system/nfs_automounted.rb host/system/numa_host.rb host/system/pci.rb host/system/version.sh
    vm/monitor/monitor_ds_vm.rb)

# install_monitord DRIVER: "onelxc", or "lxc" for --replace.
install_monitord() {
    local driver=$1 stock directory probe conf sample
    for stock in kvm lxc qemu; do
        [ ! -d "$remotes/im/$stock.d" ] || [ ! -d "$remotes/im/$stock-probes.d/host/system" ] || break
    done
    [ -d "$remotes/im/$stock.d" ] || die "no $remotes/im/kvm.d: this OpenNebula has no monitoring client to take over"

    if [ "$driver" = lxc ]; then
        set_aside "$remotes/vmm/lxc" all
        set_aside "$remotes/im/lxc-probes.d" all
    fi
    if [ "$driver" != lxc ] || [ ! -d "$remotes/im/lxc.d" ] || [ -n "${shipped[$remotes/im/lxc.d]:-}" ]; then
        put_tree "$remotes/im/$stock.d" "$remotes/im/$driver.d" "$data_files" "$directory_mode" "$data_mode" "$executable_mode"
    fi
    put_remote_tree "$bundle/remotes/vmm/lxc" "$remotes/vmm/$driver"

    put_remote_tree "$bundle/remotes/im/lxc-probes.d" "$remotes/im/$driver-probes.d"
    for directory in "${probe_directories[@]}"; do
        put_directory "$remotes/im/$driver-probes.d/$directory" "$data_files" "$directory_mode"
        case $directory in
            */*)
                put_text "Probes of OneLXC. A file here that is executable is run; the directory itself has to exist." \
                    "$remotes/im/$driver-probes.d/$directory/README" "$data_files" "$data_mode"
                ;;
        esac
    done
    for probe in "${generic_probes[@]}"; do
        if [ -f "$remotes/im/$stock-probes.d/$probe" ]; then
            put_file "$remotes/im/$stock-probes.d/$probe" "$remotes/im/$driver-probes.d/$probe" "$data_files" "$executable_mode"
        fi
    done

    sample=$remotes/etc/vmm/kvm/kvmrc
    [ -f "$sample" ] || sample=$remotes/scripts_common.sh
    conf=$remotes/etc/vmm/$driver/vmm_exec_lxc.conf
    for directory in etc etc/vmm etc/im; do
        put_directory "$remotes/$directory" "$data_files" "$directory_mode"
    done
    for directory in "etc/vmm/$driver" "etc/im/$driver-probes.d"; do
        if [ "$driver" = lxc ]; then
            put_directory "$remotes/$directory" "$data_files" "$directory_mode"
        else
            put_own_directory "$remotes/$directory" "$data_files" "$directory_mode"
        fi
    done
    put_configuration "$bundle/etc/vmm_exec_lxc.conf" "$conf" "$(own_or_mine "$sample")" "$(mode_of "$sample")"
    # pci.rb looks for its filter under the name of the directory that it lies in, and fails the host without it
    sample=$remotes/etc/im/$stock-probes.d/pci.conf
    conf=$remotes/etc/im/$driver-probes.d/pci.conf
    if [ -f "$sample" ] && { [ "$driver" != lxc ] || [ ! -e "$conf" ] || [ -n "${shipped[$conf]:-}" ]; }; then
        put_configuration "$sample" "$conf" "$(own_or_mine "$sample")" "$(mode_of "$sample")"
    fi
    install_package "$driver"
}
