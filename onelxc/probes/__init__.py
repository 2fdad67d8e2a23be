"""What each probe tells, one module for one executable under remotes/im. No lxml, yaml, libvirt or dataclasses."""
