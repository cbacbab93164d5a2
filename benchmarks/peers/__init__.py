"""How do time and peak memory compare with the field's other ways of doing the same work?"""
