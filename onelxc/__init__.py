"""OneLXC: Linux containers as OpenNebula machines, through libvirt's LXC driver."""

__version__ = "0.2.0"
