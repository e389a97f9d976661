from kdcache.cli import main
from kdcache.system.peak import tell_peak

tell_peak()
main()
