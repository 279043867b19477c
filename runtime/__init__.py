"""What any program needs of the machine: devices, files, processes, the command line.

It knows no network.
"""
