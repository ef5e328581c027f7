"""Files on other machines, read by ranges over HTTP; docs/remote.md says how.

addresses    an address becomes the list of its files, each with its length and mark
client       one range of one file, whatever the server and the network do
standins     a folder here with the small files, and the stand-ins of the weights
arrivals     many ranges ahead of their use, in bounded memory
"""
